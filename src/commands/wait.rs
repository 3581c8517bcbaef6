//! `warm wait`: until what a server is to read is there, such as a merge that another process is writing.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::arguments::ModelArgs;
use super::{CommandError, EXIT_INTERRUPTED, Environment, runtime, started};
use crate::app::{Started, load_spec, missing};
use crate::clock::Clock;
use crate::config::parse_duration;
use crate::shutdown::Signals;

/// How often it is looked for. A network volume is asked for a few names each time.
const INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// What a server would be started with, whose checkpoints are waited for; what lies on a hub or in a bucket is not.
    #[command(flatten)]
    model: ModelArgs,
    /// How long; after it the exit code is 1.
    #[arg(long, value_name = "TIME", default_value = "2h", value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: WaitArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let started = started(arguments.model, environment, &[]);
    let (runtime, clock) = (runtime()?, Clock::system());
    runtime.block_on(async {
        // As the first process of a container it would not be ended by a signal that it does not listen for.
        let signals = Signals::listen().map_err(|error| CommandError::Other(format!("signals cannot be listened for: {error}")))?;
        tokio::select! {
            waited = wait(&clock, arguments.timeout, || wanted(&started), |words| eprintln!("{words}")) => waited.map(|()| ExitCode::SUCCESS),
            _ = signals.first() => Ok(ExitCode::from(EXIT_INTERRUPTED)),
        }
    })
}

/// What is not there yet. The settings are read again each time: what is mounted may change meanwhile.
fn wanted(started: &Started) -> Result<Vec<PathBuf>, CommandError> {
    Ok(missing(load_spec(&started.resolve()?.config)?.recipe))
}

/// Looks until nothing is missing; tells what is when that has changed.
async fn wait(
    clock: &Clock,
    timeout: Duration,
    look: impl Fn() -> Result<Vec<PathBuf>, CommandError>,
    mut tell: impl FnMut(String),
) -> Result<(), CommandError> {
    let end = clock.now() + timeout;
    let mut told = Vec::new();
    loop {
        let missing = look()?;
        let names: Vec<String> = missing.iter().map(|path| path.display().to_string()).collect();
        let names = names.join(", ");
        if missing.is_empty() {
            tell("everything is there".to_owned());
            return Ok(());
        }
        let now = clock.now();
        if now >= end {
            return Err(CommandError::Other(format!("{names}: not there after {} s", timeout.as_secs())));
        }
        if missing != told {
            tell(format!("waiting for {names}"));
            told = missing;
        }
        clock.sleep_until(end.min(now + INTERVAL)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What is told, and how it ends, where each look finds the next of these.
    fn told(looks: &[&[&str]], timeout: u64) -> (Vec<String>, Result<(), String>) {
        let (clock, looks, mut told) = (Clock::manual(), RefCell::new(looks.iter()), Vec::new());
        let look = || Ok(looks.borrow_mut().next().expect("no further look").iter().map(PathBuf::from).collect());
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let waited = runtime.block_on(async {
            let mut waiting = std::pin::pin!(wait(&clock, Duration::from_secs(timeout), look, |words| told.push(words)));
            loop {
                tokio::select! {
                    biased;
                    waited = &mut waiting => return waited,
                    // It sleeps, so the hand of its clock is moved.
                    () = std::future::ready(()) => clock.advance(INTERVAL),
                }
            }
        });
        (told, waited.map_err(|error| error.to_string()))
    }

    #[test]
    fn it_ends_when_nothing_is_missing_and_tells_each_change_once() {
        let (words, ended) = told(&[&["a", "b"], &["a", "b"], &["b"], &[]], 100);
        assert_eq!(words, ["waiting for a, b", "waiting for b", "everything is there"]);
        assert_eq!(ended, Ok(()));
    }

    #[test]
    fn it_gives_up_in_time_and_says_what_is_missing() {
        let (words, ended) = told(&[&["a"][..]; 4], 6);
        assert_eq!(words, ["waiting for a"]);
        assert_eq!(ended, Err("a: not there after 6 s".to_owned()));
    }
}
