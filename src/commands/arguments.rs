//! Arguments that several commands share. Every setting of the table is a flag.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, ValueEnum};

use super::progress::Reports;
use super::{CommandError, Environment};
use crate::app::remotes;
use crate::checkpoint::Dtype;
use crate::checkpoint::remote::Remotes;
use crate::clock::Clock;
use crate::config::{Resolved, SETTINGS, Sources};
use crate::merge::{MergePlan, Recipe};
use crate::registry::Progress;

/// What to serve, and how.
#[derive(Clone, Debug, Args)]
pub(super) struct ModelArgs {
    /// Checkpoint folders; several are averaged uniformly.
    #[arg(value_name = "CHECKPOINT_DIR")]
    pub checkpoints: Vec<PathBuf>,
    /// The configuration file (YAML); also $WARM_CONFIG.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: SettingFlags,
}

/// What to merge, for commands that need no other setting.
#[derive(Clone, Debug, Args)]
pub(super) struct RecipeArgs {
    /// The recipe of the merge (YAML).
    #[arg(long, value_name = "FILE", required_unless_present = "checkpoints")]
    recipe: Option<PathBuf>,
    /// Checkpoint folders in place of a recipe: their uniform average.
    #[arg(value_name = "CHECKPOINT_DIR", conflicts_with = "recipe")]
    checkpoints: Vec<PathBuf>,
    /// What the merge is stored in, in place of what the recipe says.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<OutputDtype>,
    /// Bytes of one checkpoint that may be downloaded, as the setting says it.
    #[arg(long, value_name = "SIZE")]
    download_max_bytes: Option<String>,
}

/// What a merge may be stored in.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutputDtype {
    Float32,
    Bfloat16,
    Float16,
}

impl RecipeArgs {
    /// Plans the recipe, and before that fetches what it names that lies elsewhere, which is told on standard error.
    pub(super) fn plan(&self, remotes: &Remotes) -> Result<MergePlan, CommandError> {
        let recipe = self.resolve()?;
        let mut reports = Reports::new(Clock::system());
        let mut tell = |place: &str, done, total| {
            if let Some(words) = reports.say(&Progress::download(place, done, total)) {
                eprintln!("{words}");
            }
        };
        Ok(MergePlan::fetch(&recipe, Some(remotes), &mut tell)?)
    }

    /// Hubs and buckets, by the same variables and limits as a server's.
    pub(super) fn remotes(&self, environment: &Environment) -> Result<Remotes, CommandError> {
        let flags = self.download_max_bytes.iter().map(|size| ("download.max_bytes".to_owned(), size.clone())).collect();
        let settings = Resolved::new(Sources { environment: environment.clone(), flags, ..Sources::default() })?;
        Ok(remotes(&settings.config))
    }

    /// Reads the recipe. No checkpoint is opened.
    pub(super) fn resolve(&self) -> Result<Recipe, CommandError> {
        let recipe = match &self.recipe {
            Some(path) => Recipe::from_file(path)?,
            None => Recipe::uniform(&self.checkpoints)?,
        };
        let dtype = match self.dtype {
            None => return Ok(recipe),
            Some(OutputDtype::Float32) => Dtype::F32,
            Some(OutputDtype::Bfloat16) => Dtype::Bf16,
            Some(OutputDtype::Float16) => Dtype::F16,
        };
        recipe.with_dtype(dtype).ok_or_else(|| CommandError::Other(format!("no merge can be stored in {dtype}")))
    }
}

/// Settings given as flags: keys and values.
#[derive(Clone, Debug, Default)]
pub(super) struct SettingFlags(pub Vec<(String, String)>);

/// Flag and help of each setting; clap wants them for as long as the process lives.
static TEXTS: LazyLock<Vec<(String, String)>> = LazyLock::new(|| {
    let help = |setting: &crate::config::Setting| match setting.default {
        "" => setting.help.to_owned(),
        default => format!("{} [default: {default}]", setting.help),
    };
    SETTINGS.iter().map(|setting| (setting.flag(), help(setting))).collect()
});

impl Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        let texts: &'static [(String, String)] = &TEXTS;
        let arguments = SETTINGS.iter().zip(texts).map(|(setting, (flag, help))| {
            Arg::new(setting.key).long(flag.as_str()).value_name(setting.value).help(help.as_str()).help_heading("Settings")
        });
        command.args(arguments)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |key: &str| matches.get_one::<String>(key).map(|value| (key.to_owned(), value.clone()));
        Ok(Self(SETTINGS.iter().filter_map(|setting| given(setting.key)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        model: ModelArgs,
    }

    #[test]
    fn every_setting_is_a_flag() {
        Line::command().debug_assert();
        let line = Line::parse_from(["warm", "a", "b", "--admin-listen", "x", "--max-tokens", "5"]);
        assert_eq!(line.model.checkpoints, [PathBuf::from("a"), PathBuf::from("b")]);
        let expected = [("admin.listen", "x"), ("max_tokens", "5")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(line.model.settings.0, expected);
    }

    #[test]
    fn the_whole_command_line_is_sound() {
        super::super::Cli::command().debug_assert();
    }
}
