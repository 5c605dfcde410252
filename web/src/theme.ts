// Dark or light theme: the system's setting, unless the user has chosen one.

const CHOSEN = "bhatti-theme";

/** Applies the theme that the user has chosen, if any. */
export function applyTheme(): void {
  const chosen = localStorage.getItem(CHOSEN);
  if (chosen) document.documentElement.dataset["theme"] = chosen;
}

export function isDark(): boolean {
  const chosen = document.documentElement.dataset["theme"];
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function toggleTheme(): void {
  localStorage.setItem(CHOSEN, isDark() ? "light" : "dark");
  applyTheme();
  document.dispatchEvent(new Event("themechange"));
}

export function terminalTheme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name: string) => style.getPropertyValue(name).trim();
  const text = color("--text");
  const common = { background: color("--sunken"), foreground: text, cursor: text };
  if (isDark()) return { ...common, selectionBackground: "#3d4a5c" };
  // xterm's default colors are too pale on white.
  return {
    ...common,
    selectionBackground: "#b9d4f2",
    green: "#1a7a35",
    brightGreen: "#1a7a35",
    yellow: "#8a5a00",
    brightYellow: "#8a5a00",
    cyan: "#0b7285",
    brightCyan: "#0b7285",
    white: "#4a4f57",
    brightWhite: "#17191c",
  };
}
