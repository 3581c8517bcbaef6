//! What was served last, on disk: so that a restart comes up with it where the wanted recipe cannot be loaded, and where
//! generations go live only on call.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The name of the file in the state folder.
const FILE: &str = "last-good.json";
/// A recipe is written by hand; a file of more is not ours.
const MAX_BYTES: u64 = 4 << 20;

/// The generation that was live last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastGood {
    /// In hex.
    pub fingerprint: String,
    /// As resolved.
    pub recipe: String,
}

/// The folder where it is remembered.
#[derive(Clone, Debug)]
pub(super) struct StateFolder(pub PathBuf);

impl StateFolder {
    /// Replaces the file as a whole: after a crash at any moment it holds the old text or the new one.
    pub fn save(&self, last: &LastGood) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        let temporary = self.0.join(format!("{FILE}.{}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(last)?)?;
            file.sync_all()?;
            fs::rename(&temporary, self.0.join(FILE))
        })();
        if written.is_err() {
            // A full disk is not made fuller; that this fails, too, changes nothing.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        // The name is as durable as the text only once the folder is written.
        File::open(&self.0)?.sync_all()
    }

    /// `None` where nothing has been remembered yet.
    pub fn load(&self) -> Result<Option<LastGood>, String> {
        let path = self.0.join(FILE);
        let explain = |problem: String| format!("{}: {problem}", path.display());
        match read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| explain(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(explain(error.to_string())),
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = fs::metadata(path)?.len();
    if bytes > MAX_BYTES {
        return Err(io::Error::other(format!("has {bytes} bytes, expected at most {MAX_BYTES}")));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(name: &str) -> LastGood {
        LastGood { fingerprint: name.to_owned(), recipe: "{}".to_owned() }
    }

    #[test]
    fn what_is_saved_is_found_again_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let state = StateFolder(dir.path().join("new/folder"));
        assert_eq!(state.load(), Ok(None));
        for name in ["a", "b"] {
            state.save(&last(name)).expect("saved");
            assert_eq!(state.load(), Ok(Some(last(name))));
        }
        let files = fs::read_dir(&state.0).expect("a folder").count();
        assert_eq!(files, 1, "nothing temporary stays");
    }

    #[test]
    fn a_file_that_is_not_ours_is_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let state = StateFolder(dir.path().to_owned());
        fs::write(dir.path().join(FILE), "half a fi").expect("written");
        assert!(state.load().expect_err("broken").contains(FILE));
    }

    #[test]
    fn what_a_crash_leaves_half_written_is_never_read() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let state = StateFolder(dir.path().to_owned());
        state.save(&last("good")).expect("saved");
        fs::write(dir.path().join(format!("{FILE}.12345")), "{\"finger").expect("written");
        assert_eq!(state.load(), Ok(Some(last("good"))));
    }
}
