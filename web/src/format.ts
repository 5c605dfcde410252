// Human-readable sizes and times.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count: number): string {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count < 10 && unit > 0 ? count.toFixed(1) : Math.round(count)} ${UNITS[unit]}`;
}

export function ago(time: string | number): string {
  const seconds = Math.max(0, (Date.now() - new Date(time).getTime()) / 1000);
  const steps: [number, string][] = [
    [86_400, "day"],
    [3600, "hour"],
    [60, "minute"],
  ];
  for (const [length, name] of steps) {
    const count = Math.floor(seconds / length);
    if (count) return `${count} ${name}${count === 1 ? "" : "s"} ago`;
  }
  return seconds < 5 ? "just now" : `${Math.floor(seconds)} seconds ago`;
}

export function clock(time: string): string {
  return new Date(time).toLocaleTimeString();
}
