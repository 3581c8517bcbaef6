//! The binary: hands arguments and environment to [`warm::commands`] and exits with what comes back.

use std::process::ExitCode;

fn main() -> ExitCode {
    let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    warm::commands::run(std::env::args_os(), environment.collect())
}
