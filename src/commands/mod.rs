//! The verbs of the binary.

mod arguments;
mod bench;
mod compare;
mod demo;
mod demo_report;
mod devices;
mod fleet;
mod health;
mod lines;
mod merge;
mod plan;
mod progress;
mod report;
mod score;
mod serve;
mod verify;
mod wait;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::app::{AppError, SettingsError, Started, with_causes};
use crate::config::{ConfigErrors, FILE_VARIABLE, Resolved};
use arguments::ModelArgs;

/// The variables of the process.
pub type Environment = Vec<(String, String)>;

#[derive(Debug, Parser)]
#[command(name = "warm", version, about = "Serves weight-averaged reward models (WARM) over gRPC")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a merged reward model over gRPC.
    Serve(ModelArgs),
    /// Score lines of JSON without a network, or through a running server.
    Score(score::ScoreArgs),
    /// Compare the merged model with its members on lines of JSON, without a network or through a running server.
    Compare(compare::CompareArgs),
    /// Measure where rewards lie on a reference set, and write it as the file of `calibration.file`.
    Calibrate(compare::CalibrateArgs),
    /// Show how one line of JSON is read: rendered text, tokens, decisions, and the token that the head reads.
    Explain(score::ExplainArgs),
    /// Compare with reference scores (tools/golden.py): tokens, the token that is read, score, rank. Exits with 2 where they differ.
    Verify(verify::VerifyArgs),
    /// Show what a recipe would do, or everything that forbids it; reads no weights. The exit code is 0 or 2.
    Plan(plan::PlanArgs),
    /// Show what the weights of a recipe say of each other: norms, angles, distances, and whether averaging is plausible.
    Report(report::ReportArgs),
    /// Merge a recipe into a checkpoint on disk.
    Merge(merge::MergeArgs),
    /// Wait until the checkpoints that a server would read are there; the exit code is 0 then, and 1 when it has taken too long.
    Wait(wait::WaitArgs),
    /// Check the configuration and print it with the origin of each value.
    CheckConfig(ModelArgs),
    /// Merge the bundled family, serve it on this machine, and play the part of a trainer.
    Demo(demo::DemoArgs),
    /// Put a load on a running server, and say how it bears it.
    Bench(bench::BenchArgs),
    /// Let running servers read their recipe again, and show how it goes.
    Reload(fleet::ReloadArgs),
    /// Make a staged or held generation the live one, on one server or on a whole fleet at once.
    Activate(fleet::ActivateArgs),
    /// Show which generations are live, staged and held; the exit code is 0 if all servers agree.
    Status(fleet::StatusArgs),
    /// List the devices that this machine has and this build can use.
    Devices(devices::DevicesArgs),
    /// Ask a running server whether it serves; the exit code is 0 if it does.
    Health(health::HealthArgs),
    /// Print the version.
    Version,
}

/// What shells expect of a command that was interrupted.
const EXIT_INTERRUPTED: u8 = 130;

/// Why a command ends with an error.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    App(#[from] AppError),
    #[error(transparent)]
    Client(#[from] crate::client::ClientError),
    #[error(transparent)]
    Offline(#[from] crate::offline::OfflineError),
    #[error(transparent)]
    Recipe(#[from] crate::merge::RecipeError),
    #[error(transparent)]
    Plan(#[from] crate::merge::MergeError),
    #[error(transparent)]
    Write(#[from] crate::merge::WriteError),
    #[error("cannot read the weights: {0}")]
    Source(#[from] crate::checkpoint::SourceError),
    #[error(transparent)]
    Telemetry(#[from] crate::telemetry::TelemetryError),
    #[error("{0}")]
    Other(String),
}

impl CommandError {
    fn file(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::Other(format!("{}: {error}", path.display()))
    }
}

/// Runs one command line.
pub fn run(arguments: impl IntoIterator<Item = OsString>, environment: Environment) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not mistakes; a closed pipe is nobody's mistake.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let result = match cli.command {
        Command::Serve(arguments) => serve::run(arguments, environment),
        Command::Score(arguments) => score::run(arguments, environment),
        Command::Compare(arguments) => compare::run(arguments, environment),
        Command::Calibrate(arguments) => compare::calibrate(arguments, environment),
        Command::Explain(arguments) => score::explain(arguments, environment),
        Command::Verify(arguments) => verify::run(arguments, environment),
        Command::Plan(arguments) => plan::run(&arguments, &environment),
        Command::Report(arguments) => report::run(&arguments, &environment),
        Command::Merge(arguments) => merge::run(arguments, &environment),
        Command::Wait(arguments) => wait::run(arguments, environment),
        Command::CheckConfig(arguments) => check_config(arguments, environment),
        Command::Demo(arguments) => demo::run(arguments, environment),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Reload(arguments) => fleet::reload(arguments),
        Command::Activate(arguments) => fleet::activate(arguments),
        Command::Status(arguments) => fleet::status(arguments),
        Command::Devices(arguments) => devices::run(&arguments),
        Command::Health(arguments) => health::run(&arguments),
        Command::Version => {
            println!("warm {} ({})", crate::domain::VERSION, crate::domain::COMMIT);
            Ok(ExitCode::SUCCESS)
        }
    };
    ended(result)
}

/// Tells an error; whoever runs this process learns of it by its exit code, and starts it anew.
fn ended(result: Result<ExitCode, CommandError>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", with_causes(&error));
        ExitCode::FAILURE
    })
}

/// What a command was started with: the four sources of its settings.
fn started(arguments: ModelArgs, environment: Environment, more: &[(&str, &str)]) -> Started {
    let named = environment.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, path)| PathBuf::from(path));
    let mut flags = arguments.settings.0;
    flags.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    Started { file: arguments.config.or(named), environment, flags, folders: arguments.checkpoints }
}

/// The settings of a command.
fn resolve(arguments: ModelArgs, environment: Environment, more: &[(&str, &str)]) -> Result<Resolved, CommandError> {
    Ok(started(arguments, environment, more).resolve()?)
}

fn check_config(arguments: ModelArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let resolved = resolve(arguments, environment, &[])?;
    print!("{}", resolved.describe());
    if resolved.config.model.is_some() {
        let spec = crate::app::load_spec(&resolved.config)?;
        println!("recipe as resolved:\n{}", spec.recipe.to_resolved_string().trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// A runtime for everything but the device and the admin port.
fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("warm-io")
        .build()
        .map_err(|error| CommandError::Other(format!("the runtime cannot be started: {error}")))
}

/// What names this process in answers and logs.
fn instance(environment: &Environment) -> String {
    let host = environment.iter().find(|(name, _)| name == "HOSTNAME").map_or("warm", |(_, host)| host);
    format!("{host}-{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_is_no_success() {
        assert_eq!(ended(Err(AppError::DeviceLost.into())), ExitCode::FAILURE);
        assert_eq!(ended(Ok(ExitCode::SUCCESS)), ExitCode::SUCCESS);
    }
}
