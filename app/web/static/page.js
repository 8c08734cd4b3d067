// What all pages share: questions before something is lost, live jobs, ticks, copying. Each part looks for its own
// attribute, so that a page without it pays nothing.

document.addEventListener("submit", (event) => {
  const form = event.target;
  const question = form.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
  // A second press would do it twice. After this turn, since a disabled button's own value is not sent.
  else if (form.method === "post" && !form.matches("[hx-post]")) {
    setTimeout(() => form.querySelectorAll("button").forEach((button) => (button.disabled = true)));
  }
});
// The page may come back out of the browser's memory as it was left.
window.addEventListener("pageshow", () => {
  document.querySelectorAll("button:disabled").forEach((button) => (button.disabled = false));
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.hasAttribute("data-copy")) {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  }
  if (button?.hasAttribute("data-tick-all")) {
    button.closest("details").querySelectorAll("input[name=exclude]").forEach((box) => (box.checked = true));
    count();
  }
});

document.addEventListener("change", count);
function count() {
  for (const shown of document.querySelectorAll("[data-count-of]")) {
    const ticked = document.querySelectorAll(`input[name=${shown.dataset.countOf}]:checked`).length;
    shown.textContent = ticked ? `: ${ticked} ticked` : "";
  }
}

// A key that was revoked meanwhile.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.xhr.status === 401) {
    event.detail.shouldSwap = false;
    location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  }
});

const live = document.querySelector("[data-events]");
if (live) follow(live);

// A job's events say when to look again; what there is to see comes from the server as it is drawn there.
function follow(part) {
  const source = new EventSource(`${part.dataset.events}?after=${part.dataset.after}`);
  let due;
  const lookAgain = () => {
    due ??= setTimeout(() => {
      due = undefined;
      window.htmx.trigger(part, "refresh");
    }, 400);
  };
  for (const kind of ["status", "progress", "epoch", "log", "model"]) source.addEventListener(kind, lookAgain);
  source.addEventListener("done", () => {
    source.close();
    lookAgain();
  });
}
