//! The verbs of the binary.

mod arguments;
mod bench;
mod demo;
mod demo_report;
mod devices;
mod health;
mod merge;
mod plan;
mod progress;
mod report;
mod score;
mod serve;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::app::{AppError, with_causes};
use crate::config::{ConfigErrors, FILE_VARIABLE, Resolved, Sources};
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
    /// Check the configuration and print it with the origin of each value.
    CheckConfig(ModelArgs),
    /// Merge the bundled family, serve it on this machine, and play the part of a trainer.
    Demo(demo::DemoArgs),
    /// Put a load on a running server, and say how it bears it.
    Bench(bench::BenchArgs),
    /// List the devices that this machine has and this build can use.
    Devices(devices::DevicesArgs),
    /// Ask a running server whether it serves; the exit code is 0 if it does.
    Health(health::HealthArgs),
    /// Print the version.
    Version,
}

/// Why a command ends with an error.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Config(#[from] ConfigErrors),
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
        Command::Explain(arguments) => score::explain(arguments, environment),
        Command::Verify(arguments) => verify::run(arguments, environment),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Report(arguments) => report::run(&arguments),
        Command::Merge(arguments) => merge::run(arguments),
        Command::CheckConfig(arguments) => check_config(arguments, environment),
        Command::Demo(arguments) => demo::run(arguments, environment),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Devices(arguments) => devices::run(&arguments),
        Command::Health(arguments) => health::run(&arguments),
        Command::Version => {
            println!("warm {} ({})", crate::domain::VERSION, crate::domain::COMMIT);
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", with_causes(&error));
        ExitCode::FAILURE
    })
}

/// The settings of a command, from all four sources.
fn resolve(arguments: ModelArgs, environment: Environment, more: &[(&str, &str)]) -> Result<Resolved, CommandError> {
    let named = environment.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, path)| PathBuf::from(path));
    let file = match arguments.config.or(named) {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(&path).map_err(|error| CommandError::file(&path, error))?;
            Some((path, text))
        }
    };
    let mut flags = arguments.settings.0;
    flags.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    Ok(Resolved::new(Sources { file, environment, flags, folders: arguments.checkpoints })?)
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
