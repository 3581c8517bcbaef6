//! `warm plan`: what a recipe would do, or everything that forbids it. No weights are read.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::CommandError;
use super::arguments::RecipeArgs;
use crate::config::{SETTINGS, parse_size, parse_size_or_off};
use crate::merge::{MergeError, MergePlan};
use crate::offline::PlanSummary;

/// The recipe is wrong, or its members cannot be merged.
const EXIT_REFUSED: u8 = 2;

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The largest file of weights that a merge would write; a larger tensor gets a file of its own.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: usize,
    /// What `prefix_cache_bytes` of the server is to be: a size, or off.
    #[arg(long, value_name = "SIZE", default_value = default_of("prefix_cache_bytes"), value_parser = parse_size_or_off)]
    prefix_cache_bytes: usize,
    /// The plan, or what forbids it, as JSON.
    #[arg(long)]
    json: bool,
}

fn default_of(key: &str) -> &'static str {
    SETTINGS.iter().find(|setting| setting.key == key).map_or("", |setting| setting.default)
}

pub(super) fn run(arguments: &PlanArgs) -> Result<ExitCode, CommandError> {
    let (planned, problems) = match arguments.recipe.resolve() {
        Ok(recipe) => match MergePlan::open(&recipe) {
            Ok(plan) => (Some(plan), Vec::new()),
            Err(error) => (None, error.problems),
        },
        Err(CommandError::Recipe(error)) => {
            let place = error.file.map(|file| format!("recipe {file}: ")).unwrap_or_default();
            (None, error.problems.into_iter().map(|problem| format!("{place}{problem}")).collect())
        }
        Err(other) => return Err(other),
    };
    let Some(plan) = planned else {
        if arguments.json {
            println!("{:#}", json!({"ok": false, "problems": problems}));
        } else {
            eprintln!("error: {}", MergeError { problems });
        }
        return Ok(ExitCode::from(EXIT_REFUSED));
    };
    let (shard, prefixes) = (arguments.max_shard_size as u64, arguments.prefix_cache_bytes as u64);
    let summary = PlanSummary::new(&plan, rayon::current_num_threads(), shard, prefixes);
    if arguments.json {
        let mut plan = json!({"ok": true});
        let summary = serde_json::to_value(&summary).map_err(|error| CommandError::Other(error.to_string()))?;
        if let (Value::Object(plan), Value::Object(summary)) = (&mut plan, summary) {
            plan.extend(summary);
        }
        println!("{plan:#}");
    } else {
        println!("{summary}");
    }
    Ok(ExitCode::SUCCESS)
}
