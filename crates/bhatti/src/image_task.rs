//! `bhatti image-task`: unpacks untrusted archives in a process that confines itself.

use std::path::Path;
use std::process::ExitCode;

use bhatti_image::{TASK_COMMAND, run_task};

/// Runs a task if the command line asks for one.
pub(crate) fn run_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != TASK_COMMAND {
        return None;
    }
    let (task, directory, parent) = (arguments.next()?, arguments.next()?, arguments.next()?);
    let ran = run_task(&task.to_string_lossy(), Path::new(&directory), &parent.to_string_lossy());
    Some(ran.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}
