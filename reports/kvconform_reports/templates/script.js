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
// Search in rows and failures. What is shown is in the fragment, so that a link leads to it: #show=broken&q=window.
const search = Object.assign(document.createElement("input"), { type: "search", id: "search" });
const found = Object.assign(document.createElement("output"), { id: "found" });
const label = document.createElement("label");
label.append("Search ", search);
document.querySelector(".filter").append(label, found);
const radios = [...document.querySelectorAll(".filter [name=shown]")];
const items = [...document.querySelectorAll("#matrix tbody tr:not(.chapter), #causes tbody tr, #failures article, #known article, #unjudged tbody tr")];
let texts;
function apply() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && radios[0].checked) radios[1].checked = true; // the rows of folded chapters, too
  texts ??= items.map((item) => item.textContent.toLowerCase());
  items.forEach((item, i) => { item.hidden = !words.every((word) => texts[i].includes(word)); });
  for (const chapter of document.querySelectorAll("#matrix tbody")) {
    chapter.hidden = !chapter.querySelector("tr:not(.chapter):not([hidden])");
  }
  const count = items.filter((item) => !item.hidden).length;
  found.textContent = words.length ? `${count} of ${items.length} rows and failures` : "";
}
function save() {
  const shown = radios.find((one) => one.checked).id.slice("show-".length);
  const state = new URLSearchParams();
  if (shown !== "chapters") state.set("show", shown);
  if (search.value) state.set("q", search.value);
  history.replaceState(null, "", `#${state}`);
}
function load() {
  const state = new URLSearchParams(location.hash.slice(1));
  if (!state.has("show") && !state.has("q")) return; // the place of something on the page
  (radios.find((one) => one.id === `show-${state.get("show")}`) ?? radios[0]).checked = true;
  search.value = state.get("q") ?? "";
  apply();
}
search.addEventListener("input", () => { apply(); save(); });
radios.forEach((one) => one.addEventListener("change", () => { apply(); save(); }));
addEventListener("hashchange", load);
load();
