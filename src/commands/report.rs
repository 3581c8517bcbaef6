//! `warm report`: what a recipe's weights say of each other.

use std::process::ExitCode;

use clap::Args;

use super::arguments::RecipeArgs;
use super::progress::Reports;
use super::{CommandError, Environment};
use crate::clock::Clock;
use crate::merge::Report;
use crate::registry::Progress;

#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// All numbers, as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &ReportArgs, environment: &Environment) -> Result<ExitCode, CommandError> {
    let plan = arguments.recipe.plan(&arguments.recipe.remotes(environment)?)?;
    let mut reports = Reports::new(Clock::system());
    let report = Report::new(&plan, &mut |done, total| {
        if let Some(words) = reports.say(&Progress { stage: "report".to_owned(), done, total }) {
            eprintln!("{words}");
        }
    })?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|error| CommandError::Other(error.to_string()))?);
    } else {
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}
