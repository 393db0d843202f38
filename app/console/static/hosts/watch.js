// Looking at a host again and again, while its page is looked at.

const PAUSE_MS = 3000;

/**
 * Call `look()` now and after each pause until the signal is aborted, not while the page is hidden: each look is a
 * request to the host itself. Gives a function that looks at once.
 */
export function repeat(look, signal, pauseMs = PAUSE_MS) {
  let due = null;
  let running = null;

  async function once() {
    clearTimeout(due);
    running ??= look().finally(() => { running = null; });
    await running;
    if (!signal.aborted && !document.hidden) due = setTimeout(once, pauseMs);
  }

  const shown = () => !document.hidden && once();
  document.addEventListener("visibilitychange", shown, { signal });
  signal.addEventListener("abort", () => clearTimeout(due));
  once();
  return once;
}
