//! Arguments that several commands share. Every setting of the table is a flag.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use crate::config::SETTINGS;

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
