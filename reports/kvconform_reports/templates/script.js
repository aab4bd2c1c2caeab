for (const button of document.querySelectorAll(".replay button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
// Nobody can open anything on paper.
const shut = () => [...document.querySelectorAll(":is(.witness, .paper):not([open])")];
let opened = [];
addEventListener("beforeprint", () => { opened = shut(); opened.forEach((d) => { d.open = true; }); });
addEventListener("afterprint", () => { opened.forEach((d) => { d.open = false; }); });
