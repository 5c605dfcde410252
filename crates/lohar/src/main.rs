//! lohar, the guest agent. See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lohar::run()
}
