//! Progress bars of transfers.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::io::AsyncRead;

use super::Output;

const KNOWN: &str = "{msg} {bytes:>10}/{total_bytes:10} [{wide_bar}] {bytes_per_sec:>12} {eta:>4}";
const UNKNOWN: &str = "{msg} {bytes:>10} {bytes_per_sec:>12} {spinner}";

/// A progress bar, hidden unless progress is shown. It disappears when it is dropped.
pub(crate) struct Transfer(ProgressBar);

impl Transfer {
    /// Begins a transfer of `total` bytes, or of an unknown number.
    pub(crate) fn begin(output: Output, what: &str, total: Option<u64>) -> Self {
        let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
        let target = if output.is_watched() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        bar.set_draw_target(target);
        if let Ok(style) = ProgressStyle::with_template(total.map_or(UNKNOWN, |_| KNOWN)) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Self(bar)
    }

    /// Counts more bytes.
    pub(crate) fn add(&self, bytes: usize) {
        self.0.inc(bytes as u64);
    }

    /// Counts the bytes that are read from `content`.
    pub(crate) fn counting<R: AsyncRead + Unpin + Send + 'static>(
        &self,
        content: R,
    ) -> impl AsyncRead + Unpin + Send + 'static {
        self.0.wrap_async_read(content)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
