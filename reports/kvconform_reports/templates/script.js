for (const code of document.querySelectorAll(".replay code")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  code.after(button);
  button.addEventListener("click", async () => {
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
// Open all details for printing.
const shut = () => [...document.querySelectorAll(":is(.runtime_info, :is(#guarantees, #power, #speed) details):not([open])")];
let opened = [];
addEventListener("beforeprint", () => { opened = shut(); opened.forEach((d) => { d.open = true; }); });
addEventListener("afterprint", () => { opened.forEach((d) => { d.open = false; }); });
