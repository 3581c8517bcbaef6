//! A folder that appears whole or not at all: it is filled under another name beside its place, every file is synced, and
//! then it is renamed. Whoever looks at the place sees nothing, what stood there before, or all of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file or folder that could not be written: its place, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {problem}")]
pub struct FileError {
    pub file: String,
    pub problem: String,
}

impl FileError {
    pub fn new(file: &Path, problem: impl ToString) -> Self {
        Self { file: file.display().to_string(), problem: problem.to_string() }
    }

    fn cannot(verb: &str, file: &Path, error: io::Error) -> Self {
        Self::new(file, format_args!("cannot be {verb}: {error}"))
    }
}

/// How the names of unfinished folders end; they begin with a dot, so that nothing takes them for a checkpoint.
const ENDING: &str = ".partial";
/// Held by whoever fills the folder, for as long as it lives. A folder whose lock nobody holds was left by a crash.
const LOCK: &str = ".lock";

/// An unfinished folder. Dropped before [`Staging::publish`], it takes everything that was written with it.
#[derive(Debug)]
pub struct Staging {
    folder: PathBuf,
    _lock: File,
}

impl Staging {
    /// Begins a folder beside `place`, whose parent must exist. What crashed runs have left for the same place is removed.
    pub fn new(place: &Path) -> Result<Self, FileError> {
        // A place such as `.` or `/` cannot be renamed to, and has no name that could be told.
        let name = place.file_name().ok_or_else(|| FileError::new(place, "expected the name of a new folder"))?;
        let parent = parent(place);
        let parent = fs::canonicalize(parent).map_err(|error| FileError::cannot("opened", parent, error))?;
        let name = name.to_string_lossy();
        sweep(&parent, &format!("{name}."));
        Self::within(&parent, &name)
    }

    /// Begins a folder in `parent`, under a hidden name that tells `name`.
    pub fn within(parent: &Path, name: &str) -> Result<Self, FileError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!(".{name}.{}-{count}{ENDING}", std::process::id()));
        fs::create_dir(&folder).map_err(|error| FileError::cannot("created", &folder, error))?;
        match File::create(folder.join(LOCK)).and_then(|lock| lock.lock().map(|()| lock)) {
            Ok(lock) => Ok(Self { folder, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&folder);
                Err(FileError::cannot("locked", &folder, error))
            }
        }
    }

    /// Where the files go meanwhile.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A new file, to be written and synced by the caller. Folders in its name are made.
    pub fn create(&self, name: &str) -> Result<(PathBuf, File), FileError> {
        let path = self.folder.join(name);
        if let Some(folder) = path.parent().filter(|folder| *folder != self.folder) {
            fs::create_dir_all(folder).map_err(|error| FileError::cannot("created", folder, error))?;
        }
        let created = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        created.map_err(|error| FileError::cannot("created", &path, error)).map(|file| (path, file))
    }

    /// A small file, written and synced at once.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), FileError> {
        let (path, mut file) = self.create(name)?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(|error| FileError::cannot("written", &path, error))
    }

    /// Makes the folder appear at its place. With `replace`, what stands there goes; without, anything but an empty
    /// folder is an error, and stays.
    pub fn publish(self, place: &Path, replace: bool) -> Result<(), FileError> {
        let _ = fs::remove_file(self.folder.join(LOCK));
        sync_folders(&self.folder).map_err(|error| FileError::cannot("synced", &self.folder, error))?;
        let old = self.folder.with_extension("replaced");
        let stands = replace && place.exists();
        if stands {
            // Two renames, because the standard library has no exchange: between them the place is empty, and a crash
            // just there leaves both folders whole under their hidden names.
            fs::rename(place, &old).map_err(|error| FileError::cannot("replaced", place, error))?;
        }
        if let Err(error) = fs::rename(&self.folder, place) {
            if stands {
                let _ = fs::rename(&old, place);
            }
            return Err(match error.kind() {
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => FileError::new(place, "stands there already"),
                _ => FileError::cannot("put in place", place, error),
            });
        }
        if stands {
            let _ = fs::remove_dir_all(&old);
        }
        let parent = parent(place);
        sync_folder(parent).map_err(|error| FileError::cannot("synced", parent, error))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After publishing there is nothing of this name.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The folder in which a path's last segment stands.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes the unfinished folders in `parent` whose names begin so (behind the dot) and whose makers are gone, and says
/// whether one is still being filled. Best effort: what cannot be removed harms nobody.
pub fn sweep(parent: &Path, beginning: &str) -> bool {
    let (beginning, mut busy) = (format!(".{beginning}"), false);
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&beginning) && name.ends_with(ENDING) {
            let held = File::open(entry.path().join(LOCK)).is_ok_and(|lock| lock.try_lock().is_err());
            busy |= held;
            if !held {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    busy
}

fn sync_folders(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    sync_folder(folder)
}

/// A rename or a new name is durable when its folder is synced; Windows has no such call and needs none.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("out");
        let staging = Staging::new(&place).unwrap();
        staging.write("a", b"1").unwrap();
        staging.write("inner/b", b"2").unwrap();
        assert!(!place.exists());
        drop(staging);
        assert_eq!(names(dir.path()), [""; 0], "an abandoned folder leaves nothing");
        let staging = Staging::new(&place).unwrap();
        staging.write("a", b"1").unwrap();
        staging.write("inner/b", b"2").unwrap();
        staging.publish(&place, false).unwrap();
        assert_eq!((names(dir.path()), names(&place)), (vec!["out".to_owned()], vec!["a".to_owned(), "inner".to_owned()]));
        assert_eq!(fs::read(place.join("inner/b")).unwrap(), b"2");
    }

    #[test]
    fn what_stands_there_is_replaced_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("out");
        fs::create_dir(&place).unwrap();
        let publish = |content: &[u8], replace| {
            let staging = Staging::new(&place).unwrap();
            staging.write("a", content).unwrap();
            staging.publish(&place, replace)
        };
        publish(b"1", false).expect("an empty folder is no loss");
        let error = publish(b"2", false).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: stands there already", place.display()));
        assert_eq!(fs::read(place.join("a")).unwrap(), b"1");
        publish(b"3", true).unwrap();
        assert_eq!(fs::read(place.join("a")).unwrap(), b"3");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn what_a_crash_has_left_goes_and_what_another_run_is_filling_stays() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("out");
        let crashed = dir.path().join(".out.1-0.partial");
        fs::create_dir(&crashed).unwrap();
        fs::write(crashed.join(LOCK), b"").unwrap();
        let other = dir.path().join(".other.1-0.partial");
        fs::create_dir(&other).unwrap();
        let first = Staging::new(&place).unwrap();
        let second = Staging::new(&place).unwrap();
        assert!(!crashed.exists() && other.exists());
        assert!(first.folder().exists() && second.folder().exists());
        assert!(sweep(dir.path(), "out."), "two are being filled");
        drop((first, second));
        assert!(!sweep(dir.path(), "out."));
    }

    #[test]
    fn a_place_without_a_parent_or_a_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Staging::new(&dir.path().join("no/where")).unwrap_err().to_string();
        assert!(error.starts_with(&dir.path().join("no").display().to_string()), "{error}");
        assert!(Staging::new(Path::new("/")).is_err());
    }
}
