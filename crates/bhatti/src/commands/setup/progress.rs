//! Progress of a setup: bars on a terminal, lines in a log.

use std::io::Write;
use std::time::Duration;

use bhatti_image::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use crate::output::Output;

/// Interval at which the bar is redrawn.
const TICK: Duration = Duration::from_millis(100);

/// Runs work that takes time, and shows its progress as the output options request.
pub(in crate::commands) async fn with_progress<T>(
    output: Output,
    work: impl AsyncFnOnce(&mut dyn Progress) -> T,
) -> T {
    let silent = output.json || output.quiet;
    if output.terminal && !silent {
        work(&mut Bars::default()).await
    } else {
        work(&mut Lines::new(silent)).await
    }
}

/// A bar that shows the step, its age and its latest line.
#[derive(Default)]
struct Bars {
    bar: Option<(ProgressBar, String)>,
}

impl Progress for Bars {
    fn begin(&mut self, step: &str) {
        let bar = ProgressBar::new_spinner().with_prefix(step.to_owned());
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {prefix:18} {elapsed:>4} {wide_msg}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        self.bar = Some((bar, step.to_owned()));
    }

    fn detail(&mut self, line: &str) {
        if let Some((bar, _)) = &self.bar {
            bar.set_message(line.to_owned());
        }
    }

    fn end(&mut self, outcome: &str) {
        if let Some((bar, step)) = self.bar.take() {
            let seconds = bar.elapsed().as_secs_f64();
            bar.finish_and_clear();
            line(format_args!("{step:18} {seconds:5.1} s  {outcome}"));
        }
    }
}

/// Lines with the time since the setup began.
struct Lines {
    began: Instant,
    step: String,
    quiet: bool,
}

impl Lines {
    fn new(quiet: bool) -> Self {
        Self { began: Instant::now(), step: String::new(), quiet }
    }

    fn log(&self, text: &str) {
        if !self.quiet {
            line(format_args!(
                "[{:6.1} s] {}: {text}",
                self.began.elapsed().as_secs_f64(),
                self.step
            ));
        }
    }
}

impl Progress for Lines {
    fn begin(&mut self, step: &str) {
        step.clone_into(&mut self.step);
    }

    fn detail(&mut self, text: &str) {
        self.log(text);
    }

    fn end(&mut self, outcome: &str) {
        self.log(outcome);
    }
}

fn line(text: std::fmt::Arguments<'_>) {
    // The reader may be gone; the work continues.
    drop(writeln!(std::io::stdout(), "{text}"));
}
