//! Variables that the image sets for every process: `/etc/environment`, as pam_env(8) reads it. It
//! is read when the guest boots.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use crate::log;

const FILE: &str = "/etc/environment";

/// How much of the file is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Returns the variables of this guest's image, or none if there is no such file. A file that
/// cannot be read is reported on the console.
pub(crate) fn read() -> BTreeMap<String, String> {
    let mut text = Vec::new();
    match open(Path::new(FILE)).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut text)) {
        Ok(_) => parse(&String::from_utf8_lossy(&text)),
        Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
        Err(error) => {
            log::line(format_args!("failed to read {FILE}: {error}"));
            BTreeMap::new()
        }
    }
}

/// Opens a regular file only: a pipe or a device in its place would block the boot.
fn open(path: &Path) -> io::Result<File> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(ErrorKind::InvalidInput.into()) }
}

/// Parses lines of the form `NAME=VALUE` or `export NAME=VALUE`, with or without quotes around
/// the value. Ignores other lines.
fn parse(text: &str) -> BTreeMap<String, String> {
    let variable = |line: &str| {
        let line = line.trim();
        let (name, value) =
            line.strip_prefix("export ").unwrap_or(line).trim_start().split_once('=')?;
        let is_name = !name.is_empty()
            && name.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric());
        if !is_name || value.contains('\0') {
            return None;
        }
        let quoted = ['"', '\'']
            .into_iter()
            .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
        Some((name.to_owned(), quoted.unwrap_or(value).to_owned()))
    };
    text.lines().filter_map(variable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_opened_and_a_pipe_does_not_block() {
        let place = tempfile::tempdir().unwrap();
        let (pipe, file) = (place.path().join("pipe"), place.path().join("file"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        std::fs::write(&file, "A=1").unwrap();

        assert_eq!(open(&pipe).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(open(Path::new("/dev/zero")).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(open(place.path()).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(open(&file).is_ok());
    }

    #[test]
    fn lines_that_set_no_variable_are_ignored() {
        let text = "A=1\n export B=\"two words\" \n#C=3\nD\n=4\nE-E=5\nF='it''s'\nG=\nH=\"open\nI=a=b\nA=last\nJ=x\0y\n";

        let parsed = parse(text);

        let expected = [
            ("A", "last"),
            ("B", "two words"),
            ("F", "it''s"),
            ("G", ""),
            ("H", "\"open"),
            ("I", "a=b"),
        ];
        let parsed: Vec<_> = parsed.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(parsed, expected);
    }
}
