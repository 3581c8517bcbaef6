//! Lines of JSON in and out: what the commands that read samples from files share.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::CommandError;
use crate::domain::Truncation;

/// Where samples come from, and what is done with those that are too long.
#[derive(Debug, Args)]
pub(super) struct InputArgs {
    /// Lines of JSON, each a sample, a prompt with its completions, or a pair of them; `-` for standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub input: PathBuf,
    /// Cut samples that are too long, from this side; without it they fail.
    #[arg(long, value_name = "SIDE")]
    truncate: Option<Cut>,
}

/// Where results go.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Where the result goes; `-` for standard output.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Cut {
    /// Keep the end of a sample that is too long.
    Left,
    /// Keep its beginning.
    Right,
}

impl InputArgs {
    pub fn truncation(&self) -> Truncation {
        match self.truncate {
            None => Truncation::Refuse,
            Some(Cut::Left) => Truncation::Left,
            Some(Cut::Right) => Truncation::Right,
        }
    }

    pub fn open(&self) -> Result<Box<dyn BufRead>, CommandError> {
        if self.input == Path::new("-") {
            return Ok(Box::new(BufReader::new(io::stdin())));
        }
        let file = File::open(&self.input).map_err(|error| CommandError::file(&self.input, error))?;
        Ok(Box::new(BufReader::new(file)))
    }
}

impl OutputArgs {
    pub fn is_standard_output(&self) -> bool {
        self.output == Path::new("-")
    }

    pub fn create(&self) -> Result<Box<dyn Write>, CommandError> {
        if self.is_standard_output() {
            return Ok(Box::new(BufWriter::new(io::stdout())));
        }
        let file = File::create(&self.output).map_err(|error| CommandError::file(&self.output, error))?;
        Ok(Box::new(BufWriter::new(file)))
    }
}
