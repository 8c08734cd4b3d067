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
    const text = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      // Browsers have a clipboard for scripts over HTTPS and on localhost alone, and people may refuse it.
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
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

document.addEventListener("htmx:beforeSwap", (event) => {
  // A key that was revoked meanwhile.
  if (event.detail.xhr.status === 401) {
    event.detail.shouldSwap = false;
    location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  }
  // A form with a place for what is wrong stays, with all that was typed.
  const place = event.detail.xhr.status >= 400 && event.detail.requestConfig.elt.querySelector("[data-wrong]");
  if (place) [event.detail.target, event.detail.swapOverride] = [place, "innerHTML"];
});

const watched = document.querySelector("[data-events]");
if (watched) follow(watched);

// A job's events say when to look again; what there is to see comes from the server as it is drawn there.
function follow(job) {
  const live = document.getElementById("live");
  let due;
  let source;
  const lookAgain = () => {
    due ??= setTimeout(() => {
      due = undefined;
      window.htmx.trigger(job, "refresh");
    }, 400);
  };
  const listen = () => {
    source = new EventSource(`${job.dataset.events}?after=${live.dataset.after}`);
    for (const kind of ["status", "progress", "epoch", "log", "model"]) source.addEventListener(kind, lookAgain);
    source.addEventListener("done", () => {
      source.close();
      lookAgain();
    });
  };
  listen();
  // A browser gives up a stream that was refused, as by a server that is busy; and no event tells of a place in the queue.
  const timer = setInterval(() => {
    if ("over" in live.dataset) return clearInterval(timer);
    const isClosed = source.readyState === EventSource.CLOSED;
    if (isClosed) listen();
    if (isClosed || live.dataset.status === "queued") lookAgain();
  }, 4000);
  job.addEventListener("htmx:beforeSwap", (event) => {
    event.detail.shouldSwap = false;
    const drawn = new DOMParser().parseFromString(event.detail.serverResponse, "text/html");
    if (!drawn.getElementById("live")) return; // a failure: what is there stays, and is asked for again
    document.title = drawn.title;
    // What is the same in both is not touched: focus stays where it is, and so does the line that somebody reads.
    for (const id of ["live", "end"]) window.Idiomorph.morph(document.getElementById(id), drawn.getElementById(id));
  });
}
