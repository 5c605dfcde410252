//! The response of a command whose output was buffered: [`ExecResult`] as JSON, written piece by
//! piece. The whole JSON text would take up to six times the memory of the output.

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bhatti_api::{ExecResult, Output};

use super::{PIECE_BYTES, Part, body};
use crate::json::Json;
use crate::utf8::Utf8Pieces;

/// Bytes of output in one piece of the response: a multiple of three, so that the base64 of the
/// pieces is that of the whole.
const OUTPUT_BYTES: usize = 30 << 10;

/// Output and exit code of a command.
pub(crate) struct Collected {
    pub(crate) exit_code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Returns the response, which keeps its memory part until the end.
pub(crate) fn exec_answer(collected: Collected, part: Part) -> Response {
    let Collected { exit_code, stdout, stderr } = collected;
    if stdout.len() + stderr.len() <= PIECE_BYTES {
        let (stdout, stderr) = (Output::new(stdout), Output::new(stderr));
        return Json(ExecResult {
            exit_code,
            stdout: stdout.text,
            stderr: stderr.text,
            stdout_base64: stdout.base64,
            stderr_base64: stderr.base64,
        })
        .into_response();
    }
    let is_text = [&stdout, &stderr].map(|output| std::str::from_utf8(output).is_ok());
    let fields = [
        ("stdout", Some(Writer::Text { pieces: Utf8Pieces::default() })),
        ("stderr", Some(Writer::Text { pieces: Utf8Pieces::default() })),
        ("stdout_base64", (!is_text[0]).then_some(Writer::Base64)),
        ("stderr_base64", (!is_text[1]).then_some(Writer::Base64)),
    ];
    let outputs = [stdout, stderr];
    let mut fields = fields.into_iter().enumerate().filter_map(|(index, (name, writer))| {
        Some(Field { name, output: index % 2, writer: writer?, at: None })
    });
    let mut current = fields.next();
    let mut begin = Some(format!("{{\"exit_code\":{exit_code}").into_bytes());
    let pieces = std::iter::from_fn(move || {
        let _held = &part;
        if let Some(begin) = begin.take() {
            return Some(Bytes::from(begin));
        }
        let field = current.as_mut()?;
        let (piece, is_last) = field.next(&outputs[field.output]);
        let mut piece = piece.into_bytes();
        if is_last {
            current = fields.next();
            if current.is_none() {
                piece.push(b'}');
            }
        }
        Some(Bytes::from(piece))
    });
    ([(CONTENT_TYPE, "application/json")], body(pieces)).into_response()
}

/// Encoding of bytes inside a JSON string.
enum Writer {
    /// As text, with U+FFFD in place of invalid UTF-8.
    Text {
        pieces: Utf8Pieces,
    },
    Base64,
}

/// A field that is being written.
struct Field {
    name: &'static str,
    output: usize,
    writer: Writer,
    /// Position of the next byte of the output; `None` before the field's name is written.
    at: Option<usize>,
}

impl Field {
    /// Returns the next piece of the field, and whether it is the last.
    fn next(&mut self, output: &[u8]) -> (String, bool) {
        let mut json =
            if self.at.is_none() { format!(",\"{}\":\"", self.name) } else { String::new() };
        let at = self.at.unwrap_or(0);
        let end = output.len().min(at + OUTPUT_BYTES);
        let is_last = end == output.len();
        self.at = Some(end);
        match &mut self.writer {
            Writer::Base64 => STANDARD.encode_string(&output[at..end], &mut json),
            Writer::Text { pieces } => {
                let mut text = pieces.push(&output[at..end]);
                if is_last {
                    text.extend(pieces.finish());
                }
                json.push_str(&escaped(&String::from_utf8_lossy(&text)));
            }
        }
        if is_last {
            json.push('"');
        }
        (json, is_last)
    }
}

/// Escapes a text for use in a JSON string, without the quotes.
fn escaped(text: &str) -> String {
    // Serializing a text cannot fail.
    let quoted = serde_json::to_string(text).unwrap_or_default();
    quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::super::AnswerMemory;
    use super::*;
    use bhatti_types::UserId;

    async fn answered(stdout: &[u8], stderr: &[u8]) -> ExecResult {
        let part = AnswerMemory::default().part(UserId::ADMIN);
        let (stdout, stderr) = (stdout.to_vec(), stderr.to_vec());
        let answer = exec_answer(Collected { exit_code: -3, stdout, stderr }, part);
        let json = answer.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&json).unwrap()
    }

    #[tokio::test]
    async fn response_in_pieces_equals_the_whole_response() {
        let text = "größe ☃ \"\\ \n\u{1}".repeat(10_000).into_bytes();
        let bytes: Vec<u8> = (0..200_000u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let zeros = vec![0; 3 * OUTPUT_BYTES];
        for (stdout, stderr) in
            [(&text, &Vec::new()), (&Vec::new(), &bytes), (&bytes, &text), (&zeros, &zeros)]
        {
            let result = answered(stdout, stderr).await;

            let whole = [stdout, stderr].map(|bytes| Output::new(bytes.clone()));
            assert_eq!(result.exit_code, -3);
            assert!(result.stdout == whole[0].text && result.stderr == whole[1].text);
            assert!(result.stdout_base64 == whole[0].base64);
            assert!(result.stderr_base64 == whole[1].base64);
        }
    }
}
