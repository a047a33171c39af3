// What the kernel cannot do: commands from HTML, the clipboard, saving, keys, the address, pan and zoom.
(() => {
  if (window.sqlbenchChat) return;
  window.sqlbenchChat = true;
  const page = "voila" in document.body.dataset;

  // Everything that the kernel hears comes as the text of a panel's hidden field.
  function tell(panel, text) {
    const field = [...panel.children].find((c) => c.classList.contains("sqlbench-bridge"))?.querySelector("input");
    if (!field) return false;
    field.value = `${text}#${Date.now()}`;
    field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new Event("change", {bubbles: true}));
    return true;
  }

  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.body.appendChild(Object.assign(document.createElement("textarea"), {value: text}));
    area.select();
    document.execCommand("copy"); // where the page did not come over HTTPS
    area.remove();
  }

  let dragged = 0;
  document.addEventListener("click", (event) => {
    const copier = event.target.closest?.("[data-copy]");
    if (copier) {
      copy(copier.parentElement.querySelector("pre").innerText);
      copier.textContent = "Copied";
      return;
    }
    const doer = event.target.closest?.("[data-do]");
    if (doer && dragged < 5) tell(doer.closest(".sqlbench-panel"), doer.dataset.do);
  });

  // The arrows bring back what was asked.
  let asked = -1;
  document.addEventListener("keydown", (event) => {
    const field = event.target;
    if (!field.closest?.(".sqlbench-question")) return;
    const before = [...document.querySelectorAll("[data-question]")].map((e) => e.dataset.question);
    if (event.key === "ArrowUp") asked = asked < 0 ? before.length - 1 : Math.max(0, asked - 1);
    else if (event.key === "ArrowDown" && asked >= 0) asked += 1;
    else return void (asked = -1);
    field.value = before[asked] ?? "";
    if (asked >= before.length) asked = -1;
    field.dispatchEvent(new Event("input", {bubbles: true}));
    event.preventDefault();
  }, true); // widgets keep keys to themselves

  // Pan and zoom by the view box of the diagram.
  const box = (svg) => svg.viewBox.baseVal;
  document.addEventListener("wheel", (event) => {
    const svg = event.target.closest?.(".sqlbench-diagram svg");
    if (!svg) return;
    event.preventDefault();
    const view = box(svg), frame = svg.getBoundingClientRect(), by = Math.exp(event.deltaY / 500);
    const x = (event.clientX - frame.x) / frame.width, y = (event.clientY - frame.y) / frame.height;
    view.x += view.width * x * (1 - by);
    view.y += view.height * y * (1 - by);
    view.width *= by;
    view.height *= by;
  }, {passive: false});
  let held = null;
  document.addEventListener("pointerdown", (event) => {
    held = event.target.closest?.(".sqlbench-diagram svg");
    dragged = 0;
  });
  document.addEventListener("pointerup", () => (held = null));
  document.addEventListener("pointermove", (event) => {
    if (!held) return;
    const view = box(held), frame = held.getBoundingClientRect();
    const scale = Math.max(view.width / frame.width, view.height / frame.height);
    dragged += Math.abs(event.movementX) + Math.abs(event.movementY);
    view.x -= event.movementX * scale;
    view.y -= event.movementY * scale;
  });

  // What appears: links to follow, the name for the address, the newest turn, fields without a name.
  let greeted = false, newest = true;
  const browser = () => { // a secret name, by which this browser finds its own conversations again
    const made = () => [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, "0")).join("");
    try {
      return (localStorage.sqlbenchBrowser ||= made());
    } catch {
      return made(); // where nothing may be stored
    }
  };
  document.addEventListener("scroll", (event) => {
    const list = event.target;
    if (list.classList?.contains("sqlbench-turns"))
      newest = list.scrollTop + list.clientHeight > list.scrollHeight - 60;
  }, true);
  function look() {
    for (const link of document.querySelectorAll("a[data-save]")) {
      delete link.dataset.save;
      link.click();
    }
    for (const field of document.querySelectorAll(
      ".sqlbench-chat :is(input, textarea, select):not([aria-label], [aria-labelledby], [data-seen])")) {
      field.dataset.seen = "";
      const name = field.closest(".jupyter-widgets")?.querySelector("label")?.textContent.trim()
        || field.placeholder || field.title || field.parentElement.title;
      if (name) field.setAttribute("aria-label", name);
    }
    const list = document.querySelector(".sqlbench-turns");
    if (list && page && innerWidth > 700) { // the question stays at the bottom of the window, whatever is above
      const below = [...list.parentElement.children].slice([...list.parentElement.children].indexOf(list) + 1);
      const room = innerHeight - list.getBoundingClientRect().top - below.reduce((sum, e) => sum + e.offsetHeight, 40);
      list.style.maxHeight = `${Math.max(160, room)}px`;
    }
    if (list && newest) list.scrollTop = list.scrollHeight;
    if (!page) return;
    const chat = document.querySelector(".sqlbench-chat");
    if (chat && !greeted) greeted = tell(chat, `open:${browser()}/${location.hash.slice(1)}`);
    const name = document.querySelector("[data-conversation]")?.dataset.conversation;
    if (greeted && name && location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
  }
  let due = false;
  new MutationObserver(() => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; look(); });
  }).observe(document.body, {subtree: true, childList: true});
  addEventListener("resize", look);
  look();

  if (page) {
    document.title = "sqlbench chat";
    const icon = document.querySelector("link[rel=icon]") ?? document.head.appendChild(document.createElement("link"));
    icon.rel = "icon";
    icon.href = "data:image/svg+xml," + encodeURIComponent(
      '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0072b2"/>' +
      '<ellipse cx="8" cy="4.5" rx="5" ry="2" fill="#fff"/><path d="M3 6v6c0 1.1 2.2 2 5 2s5-.9 5-2V6" fill="none" ' +
      'stroke="#fff" stroke-width="1.4"/></svg>');
  }
})();
