//! Runs the programs that builds use.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// Number of lines of a failed program's output that its error shows.
const ERROR_LINES: usize = 8;

/// A program failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program is not installed.
    #[error("`{program}` is not installed; install it with: apt-get install {package}")]
    NotInstalled {
        /// The program.
        program: String,
        /// Debian's package with the program.
        package: &'static str,
    },
    /// The program could not be run.
    #[error("failed to run `{program}`")]
    Run {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program ran and failed.
    #[error("`{program}` failed ({status}):\n{output}")]
    Failed {
        /// The program.
        program: String,
        /// Exit status.
        status: std::process::ExitStatus,
        /// The last lines of its output.
        output: String,
    },
}

/// Returns the Debian package of a program.
fn package_of(program: &str) -> &'static str {
    match program {
        "mmdebstrap" => "mmdebstrap",
        "fakeroot" => "fakeroot",
        "mke2fs" => "e2fsprogs",
        "fakechroot" => "fakechroot",
        "setpriv" | "unshare" => "util-linux",
        "tar" => "tar",
        "dpkg-deb" | "dpkg" => "dpkg",
        _ => "apt",
    }
}

/// Runs a program to its end and returns its standard output. Passes each line of its standard
/// error to `line` at once.
pub(crate) async fn run(
    program: &str,
    arguments: &[&str],
    directory: &Path,
    line: &mut (dyn FnMut(&str) + Send),
) -> Result<String, ToolError> {
    let mut command = prepare(program, directory);
    command.args(arguments);
    run_prepared(program, command, line).await
}

/// Prepares a program that keeps its own files in `directory`.
pub(crate) fn prepare(program: &str, directory: &Path) -> Command {
    let mut command = bhatti_host::process::command(program);
    command.current_dir(directory).env("TMPDIR", directory).env("HOME", directory);
    command
}

/// Runs a prepared program as [`run`] does.
pub(crate) async fn run_prepared(
    program: &str,
    mut command: Command,
    line: &mut (dyn FnMut(&str) + Send),
) -> Result<String, ToolError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => {
            ToolError::NotInstalled { program: program.to_owned(), package: package_of(program) }
        }
        _ => ToolError::Run { program: program.to_owned(), source },
    };
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;

    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut last_lines = VecDeque::new();
    let read_errors = async {
        let Some(stderr) = stderr else { return Ok(()) };
        let mut lines = BufReader::new(stderr).split(b'\n');
        while let Some(bytes) = lines.next_segment().await? {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            line(&text);
            last_lines.push_back(text);
            if last_lines.len() > ERROR_LINES {
                last_lines.pop_front();
            }
        }
        Ok(())
    };
    let mut output = Vec::new();
    let read_output = async {
        match stdout {
            Some(mut stdout) => tokio::io::copy(&mut stdout, &mut output).await.map(|_| ()),
            None => Ok(()),
        }
    };
    tokio::try_join!(read_errors, read_output).map_err(failed)?;
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        let output = Vec::from(last_lines).join("\n");
        return Err(ToolError::Failed { program: program.to_owned(), status, output });
    }
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// Runs a program as [`run`] does, without reporting its progress.
pub(crate) async fn run_quietly(
    program: &str,
    arguments: &[&str],
    directory: &Path,
) -> Result<String, ToolError> {
    run(program, arguments, directory, &mut |_| {}).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn missing_program_is_named_with_its_package() {
        let error = run_quietly("mke2fs-of-tomorrow", &[], Path::new("/")).await.unwrap_err();

        assert!(matches!(error, ToolError::NotInstalled { .. }), "{error}");
    }

    #[tokio::test]
    async fn failure_shows_the_last_lines() {
        let script = "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i >&2; done; exit 3";

        let error = run_quietly("sh", &["-c", script], Path::new("/")).await.unwrap_err();

        let ToolError::Failed { status, output, .. } = error else { panic!("{error}") };
        assert_eq!(status.code(), Some(3));
        assert_eq!(output.lines().next(), Some("line 3"));
        assert_eq!(output.lines().last(), Some("line 10"));
    }
}
