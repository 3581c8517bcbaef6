//! The binary, without the settings of whoever runs the tests.

mod remote;

use std::process::Command;

pub fn warm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warm"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WARM_")) {
        command.env_remove(name);
    }
    command
}
