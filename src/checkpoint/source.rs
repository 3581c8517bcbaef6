//! The seam between files and models: a checkpoint whose tensors are read, or computed when they are read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Adapter, Dtype, Elements, Manifest, TensorInfo};

/// Why a tensor could not be read: the place, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SourceError {
    /// Reading failed, or the file is no longer what its header said.
    #[error("{file}: tensor {tensor:?}: {problem}")]
    Read { file: String, tensor: String, problem: String },
    /// A value that is NaN or infinite.
    #[error("{file}: tensor {tensor:?}: element {index} is {value}, expected finite numbers")]
    NonFinite { file: String, tensor: String, index: usize, value: f64 },
    /// A merged value that the output dtype cannot hold.
    #[error("tensor {tensor:?}: element {index} merges to {value}, which {dtype} cannot hold; choose a wider dtype")]
    Overflow { tensor: String, index: usize, value: f64, dtype: Dtype },
    /// A name or range that the manifest does not have: a mistake of the caller.
    #[error("tensor {tensor:?}: {problem}")]
    NoSuchTensor { tensor: String, problem: String },
}

/// What a checkpoint folder, an adapter on its base, and a merge all are. The model loader cannot tell them apart.
pub trait TensorSource: Send + Sync {
    /// Names, dtypes and shapes of all tensors that [`TensorSource::read`] gives.
    fn manifest(&self) -> &Manifest;

    /// Reads the elements `range` (row-major indices into the flattened tensor) of `name` into `into`, replacing its
    /// content; the variant is that of the manifest's dtype. Floating-point values are checked: a NaN or an infinity is
    /// an error that names the file, the tensor and the element. After an error the content of `into` is unspecified.
    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError>;

    /// All files that the tensors come from, as they stand now: as long as they are the same, so are the tensors. `None`
    /// where that cannot be said.
    fn files(&self) -> Option<Vec<FileStamp>> {
        None
    }

    /// The adapter that this source is, if it is one on a base: hashes and plans name what is stored, not what is computed.
    fn adapter(&self) -> Option<&Adapter> {
        None
    }
}

/// What tells whether a file is still the same, without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp {
    pub path: PathBuf,
    pub bytes: u64,
    pub modified: SystemTime,
    /// Its number in the file system; zero where files have none.
    pub inode: u64,
    /// When its content or what is said about it last changed, in seconds and nanoseconds, which unlike `modified` nobody
    /// can set; zero where the system does not keep it.
    pub changed: (i64, i64),
}

impl FileStamp {
    /// The stamp of an open file, which may have gone from its path.
    pub fn of(path: &Path, file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        #[cfg(unix)]
        let (inode, changed) = {
            use std::os::unix::fs::MetadataExt;
            (found.ino(), (found.ctime(), found.ctime_nsec()))
        };
        #[cfg(not(unix))]
        let (inode, changed) = (0, (0, 0));
        let path = std::path::absolute(path)?;
        Ok(Self { path, bytes: found.len(), modified: found.modified()?, inode, changed })
    }
}

/// How many elements a caller should ask for at once: large enough to be fast, small enough to keep memory flat.
pub const CHUNK_ELEMENTS: usize = 4 << 20;

/// The tensor that a [`TensorSource::read`] asks for, if the manifest has it and the range lies within it.
pub fn look_up<'m>(manifest: &'m Manifest, name: &str, range: &Range<usize>) -> Result<&'m TensorInfo, SourceError> {
    let wrong = |problem: String| SourceError::NoSuchTensor { tensor: name.to_owned(), problem };
    let info = manifest.get(name).ok_or_else(|| wrong("there is no tensor of this name".to_owned()))?;
    if range.start > range.end || range.end > info.elements() {
        return Err(wrong(format!("elements {range:?} were asked for, expected a range within 0..{}", info.elements())));
    }
    Ok(info)
}
