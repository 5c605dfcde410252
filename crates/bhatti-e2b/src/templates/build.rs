//! A build of a template: its state, and its log as a list of lines.

use std::sync::Arc;

use bhatti_control::{Operation, OperationFailure, OperationState, TemplateBuildError};
use bhatti_types::{CpuCount, MemoryMib, Report, TemplateName};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::{Value, json};

/// The maximum size of what is kept of a build's output, in bytes. Later lines are left out.
const LOG_BYTES_MAX: usize = 512 << 10;

/// What a line takes beside its text, in bytes.
const LINE_BYTES: usize = 64;

/// The maximum length of a line, in bytes. Longer ones are cut into several.
const LINE_BYTES_MAX: usize = 2 << 10;

/// The maximum number of lines in an answer.
const LINES_SHOWN_MAX: usize = 100;

/// A build.
pub(crate) struct Build {
    /// A UUID.
    pub(crate) id: String,
    /// The template's name without a tag, which is also its id.
    pub(crate) name: String,
    /// The names that the template gets.
    pub(crate) names: Vec<TemplateName>,
    pub(crate) cpus: Option<CpuCount>,
    pub(crate) memory: Option<MemoryMib>,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    state: State,
    lines: Vec<Line>,
    /// The begin of a line that has no end yet.
    begun: Vec<u8>,
    /// The size of the lines.
    bytes: usize,
    /// Whether lines have been left out.
    is_full: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Waiting,
    Building,
    Ready,
    Failed(Reason),
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) message: String,
    /// The step of the request, from 1 on, or the name of a phase.
    pub(crate) step: Option<String>,
}

#[derive(Clone)]
struct Line {
    at: Timestamp,
    level: &'static str,
    text: String,
}

impl Line {
    fn new(level: &'static str, text: String) -> Self {
        Self { at: Timestamp::now(), level, text }
    }

    fn json(&self) -> Value {
        json!({ "timestamp": self.at.to_string(), "level": self.level, "message": self.text })
    }
}

impl Build {
    pub(crate) fn new(id: String, name: String) -> Self {
        let progress = Mutex::default();
        Self { id, name, names: Vec::new(), cpus: None, memory: None, progress }
    }

    /// Whether it has begun and not ended.
    pub(crate) fn runs(&self) -> bool {
        self.progress.lock().state == State::Building
    }

    /// Begins it. Returns `false` if it has begun already.
    pub(crate) fn begin(&self) -> bool {
        let mut progress = self.progress.lock();
        let waits = progress.state == State::Waiting;
        if waits {
            progress.state = State::Building;
        }
        waits
    }

    /// Ends it.
    pub(crate) fn end(&self, ended: Result<(), Reason>) {
        let mut progress = self.progress.lock();
        progress.cut_line();
        let (level, text, state) = match ended {
            Ok(()) => ("info", "the template is ready".to_owned(), State::Ready),
            Err(reason) => ("error", reason.message.clone(), State::Failed(reason)),
        };
        // The last line is always there.
        progress.lines.push(Line::new(level, text));
        progress.state = state;
    }

    /// Ends it before it has an operation.
    pub(crate) fn fail(&self, message: &str) {
        self.end(Err(Reason { message: message.to_owned(), step: None }));
    }

    /// Adds output of the build.
    fn write(&self, output: &[u8]) {
        let mut progress = self.progress.lock();
        for byte in output {
            match byte {
                b'\n' => progress.cut_line(),
                byte => progress.begun.push(*byte),
            }
            if progress.begun.len() >= LINE_BYTES_MAX {
                progress.cut_line();
            }
        }
    }

    /// Follows the operation that builds it, to its end. `step_of` has the step of the request, or
    /// the name of a phase, for each step of the operation.
    pub(crate) async fn follow(self: Arc<Self>, operation: Operation, step_of: Vec<String>) {
        let mut from = 0;
        while let Some(part) = operation.output(from).await {
            from = part.start + part.bytes.len() as u64;
            self.write(&part.bytes);
        }
        self.end(match operation.ended().await {
            OperationState::Done(_) => Ok(()),
            OperationState::Failed(failure) => Err(reason(&failure, &step_of)),
            OperationState::Canceled | OperationState::Running => {
                Err(Reason { message: "the build was canceled".to_owned(), step: None })
            }
        });
    }

    /// Describes the build, with its log from line `offset` on.
    pub(crate) fn status(&self, offset: usize) -> Value {
        let progress = self.progress.lock();
        let lines = progress.lines.iter().skip(offset).take(LINES_SHOWN_MAX);
        let (status, reason) = match &progress.state {
            State::Waiting => ("waiting", None),
            State::Building => ("building", None),
            State::Ready => ("ready", None),
            State::Failed(reason) => ("error", Some(reason)),
        };
        let mut described = status_of(&self.name, &self.id, status);
        described["logEntries"] = lines.map(Line::json).collect();
        if let Some(Reason { message, step }) = reason {
            described["reason"] = json!({ "message": message });
            if let Some(step) = step {
                described["reason"]["step"] = json!(step);
            }
        }
        described
    }
}

impl Progress {
    fn cut_line(&mut self) {
        if self.begun.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(&self.begun).trim_end_matches('\r').to_owned();
        self.begun.clear();
        let bytes = self.bytes + LINE_BYTES + text.len();
        if self.is_full {
            return;
        }
        if bytes > LOG_BYTES_MAX {
            self.is_full = true;
            let text = format!("further output is left out: a log has {} KiB", LOG_BYTES_MAX >> 10);
            self.lines.push(Line::new("warn", text));
            return;
        }
        self.bytes = bytes;
        self.lines.push(Line::new("info", text));
    }
}

/// Describes a build without a log.
pub(crate) fn status_of(template: &str, id: &str, status: &str) -> Value {
    json!({
        "templateID": template,
        "buildID": id,
        "status": status,
        "logs": [],
        "logEntries": [],
    })
}

/// Describes a failure.
fn reason(failure: &OperationFailure, step_of: &[String]) -> Reason {
    let step = match failure {
        OperationFailure::Template(TemplateBuildError::Failed { number, .. }) => {
            number.checked_sub(1).and_then(|index| step_of.get(index)).cloned()
        }
        OperationFailure::Template(
            TemplateBuildError::Ended(_) | TemplateBuildError::NotReady(_),
        ) => Some("finalize".to_owned()),
        _ => None,
    };
    Reason { message: Report(failure).to_string(), step }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(build: &Build, offset: usize) -> Vec<String> {
        let lines = build.status(offset)["logEntries"].as_array().unwrap().clone();
        lines.iter().map(|line| line["message"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn log_has_the_lines_of_the_output_and_the_end() {
        let build = Build::new("id".to_owned(), "name".to_owned());
        assert_eq!(build.status(0)["status"], "waiting");
        assert!(build.begin() && !build.begin());
        build.write(b"one\ntw");
        build.write(b"o\r\n\nthree");
        assert_eq!(texts(&build, 0), ["one", "two"]);
        assert_eq!(build.status(0)["status"], "building");

        let step = Some("2".to_owned());
        build.end(Err(Reason { message: "broken".to_owned(), step }));

        assert_eq!(texts(&build, 1), ["two", "three", "broken"]);
        let status = build.status(9);
        assert_eq!(status["status"], "error");
        assert_eq!(status["reason"], json!({ "message": "broken", "step": "2" }));
    }

    #[test]
    fn log_has_a_limit() {
        let build = Build::new("id".to_owned(), "name".to_owned());
        build.write(&vec![b'x'; 3 * LINE_BYTES_MAX]);
        assert_eq!(texts(&build, 0).len(), 3);
        for output in ["\u{1}\n".repeat(LOG_BYTES_MAX), "x".repeat(2 * LOG_BYTES_MAX)] {
            build.write(output.as_bytes());
        }
        build.end(Ok(()));

        assert_eq!(texts(&build, 0).len(), LINES_SHOWN_MAX);
        let progress = build.progress.lock();
        let bytes: usize = progress.lines.iter().map(|line| line.text.len() + LINE_BYTES).sum();
        assert!(bytes < LOG_BYTES_MAX + (1 << 10), "{bytes}");
        let lines = progress.lines.len();
        drop(progress);
        let last = texts(&build, lines - 2);
        assert!(last[0].starts_with("further output is left out"), "{last:?}");
        assert_eq!(last[1], "the template is ready");
    }
}
