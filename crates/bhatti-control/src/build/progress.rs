//! What Buildah says while it builds.

use std::collections::BTreeMap;

/// Bytes of a line that has no end yet, after which it is passed on.
const LINE_BYTES_MAX: usize = 16 << 10;

/// What Buildah says of a step whose result is in the cache, before the id of the result.
const CACHED: &str = "--> Using cache";

/// A step that Buildah has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The stage, from 1 on.
    pub(super) stage: usize,
    /// The step of the stage, from 1 on.
    pub(super) step: usize,
    /// The instruction.
    pub(super) text: String,
}

/// Follows Buildah's output line by line.
pub(super) struct Progress {
    /// What the Dockerfile calls the images, by id.
    names: BTreeMap<String, String>,
    line: Vec<u8>,
    /// The last step that has begun.
    pub(super) step: Option<Step>,
    /// The last line that is not empty.
    pub(super) last: String,
}

impl Progress {
    /// `names` has the names of images by their ids.
    pub(super) fn new(names: BTreeMap<String, String>) -> Self {
        Self { names, line: Vec::new(), step: None, last: String::new() }
    }

    /// Takes output, and returns the lines that it ends.
    pub(super) fn read(&mut self, output: &[u8]) -> Vec<u8> {
        let mut lines = Vec::new();
        for byte in output {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_BYTES_MAX {
                lines.extend(self.end_line());
            }
        }
        lines
    }

    /// Returns the last line, if it has no end.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        self.end_line()
    }

    fn end_line(&mut self) -> Vec<u8> {
        let line = std::mem::take(&mut self.line);
        let Ok(text) = str::from_utf8(&line) else { return line };
        if let Some(step) = parse_step(text.trim_end()) {
            let text = self.named(text);
            self.step = Some(step);
            self.last = text.trim().to_owned();
            return text.into_bytes();
        }
        if is_noise(text.trim()) {
            return Vec::new();
        }
        if !text.trim().is_empty() {
            self.last = text.trim().to_owned();
        }
        if text.starts_with(CACHED) {
            return format!("{CACHED}\n").into_bytes();
        }
        line
    }

    /// Puts the name of an image in the place of its id, in a step that begins a stage.
    fn named(&self, text: &str) -> String {
        let Some((before, image)) = text.split_once(": FROM ") else { return text.to_owned() };
        let id = image.split_whitespace().next().unwrap_or_default();
        match self.names.get(id) {
            Some(name) => format!("{before}: FROM {name}{}", &image[id.len()..]),
            None => text.to_owned(),
        }
    }
}

/// Whether a line tells only the id of a result, or its name in the build's sandbox.
fn is_noise(line: &str) -> bool {
    let id = line.strip_prefix("--> ").unwrap_or(line);
    let is_id = matches!(id.len(), 12 | 64) && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id || line.starts_with("Successfully tagged ") || line.ends_with("COMMIT localhost/result")
}

/// Reads `[STAGE/STAGES] STEP NUMBER/STEPS: INSTRUCTION`. The stage is absent if there is one.
fn parse_step(line: &str) -> Option<Step> {
    let (stage, rest) = match line.strip_prefix('[') {
        Some(rest) => {
            let (stages, rest) = rest.split_once("] ")?;
            (stages.split_once('/')?.0.parse().ok()?, rest)
        }
        None => (1, line),
    };
    let (numbers, text) = rest.strip_prefix("STEP ")?.split_once(": ")?;
    let step = numbers.split_once('/')?.0.parse().ok()?;
    Some(Step { stage, step, text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_recognized_and_images_have_their_names() {
        let names = [("abc".to_owned(), "python:3".to_owned())].into();
        let mut progress = Progress::new(names);

        assert_eq!(progress.read(b"STEP 1/2: FROM a"), b"");
        assert_eq!(progress.read(b"bc\nout abc\n"), b"STEP 1/2: FROM python:3\nout abc\n");
        let first = Step { stage: 1, step: 1, text: "FROM abc".to_owned() };
        assert_eq!(progress.step, Some(first));

        let several = progress.read(b"[1/2] STEP 1/9: FROM abc AS abc\n");
        assert_eq!(several, b"[1/2] STEP 1/9: FROM python:3 AS abc\n");

        progress.read(b"[2/3] STEP 4/6: RUN false\nSTEP x\n[1/2 STEP 1/1: A\n\nError: no");
        let step = Step { stage: 2, step: 4, text: "RUN false".to_owned() };
        assert_eq!(progress.step, Some(step));
        assert_eq!(progress.finish(), b"Error: no");
        assert_eq!(progress.last, "Error: no");
        assert_eq!(progress.read(&[b'x'; 20 << 10]).len(), 16 << 10);
        progress.finish();
        let id = "ab".repeat(32);
        let said = format!("--> Using cache {id}\n{id}\n--> abcdefabcdef\nab\n");
        assert_eq!(progress.read(said.as_bytes()), b"--> Using cache\nab\n");
    }
}
