// What Gradio leaves nameless for a screen reader: "Remove 23" says which title, lists of options
// are called as their field, icons are passed over.
new MutationObserver(() => {
  for (const button of document.querySelectorAll(".token-remove:not(.remove-all)")) {
    const name = "Remove " + button.previousElementSibling.textContent.trim();
    if (button.title !== name) button.title = name;
  }
  for (const list of document.querySelectorAll("[role=listbox]:not([aria-label])")) {
    const field = document.querySelector(`[aria-controls="${list.id}"]`);
    if (field) list.setAttribute("aria-label", field.getAttribute("aria-label"));
  }
  for (const icon of document.querySelectorAll("svg:not([role]):not([aria-hidden])")) {
    icon.setAttribute("aria-hidden", "true");
  }
}).observe(document, { childList: true, subtree: true });
