//! `s3://bucket/folder`, `gs://bucket/folder` or `az://container/folder`, checked.

use std::fmt;
use std::str::FromStr;

use super::hub_path::is_segment;

/// A folder in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BucketPath {
    pub store: Store,
    pub bucket: String,
    /// Without slashes at its ends; empty for all of the bucket.
    pub folder: String,
}

/// Whose bucket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    S3,
    Gcs,
    Azure,
}

impl Store {
    const ALL: [Self; 3] = [Self::S3, Self::Gcs, Self::Azure];

    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        }
    }

    /// How the variables begin that say how it is reached.
    pub fn variables(self) -> &'static str {
        match self {
            Self::S3 => "AWS_",
            Self::Gcs => "GOOGLE_",
            Self::Azure => "AZURE_",
        }
    }

    fn of(path: &str) -> Option<(Self, &str)> {
        Self::ALL.into_iter().find_map(|store| Some((store, path.strip_prefix(store.scheme())?.strip_prefix("://")?)))
    }
}

/// Whether a text names a place in a bucket.
pub(super) fn is_bucket(path: &str) -> bool {
    Store::of(path).is_some()
}

impl FromStr for BucketPath {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        let wrong = |problem: &str| Err(format!("{problem}; expected s3://bucket/folder, gs://bucket/folder or az://container/folder"));
        let Some((store, rest)) = Store::of(path) else { return wrong("names no bucket") };
        let (bucket, folder) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_segment(bucket) {
            return wrong("the bucket's name is not one of letters, digits, dots and dashes");
        }
        let folder = folder.trim_end_matches('/');
        // Names in buckets are nearly free; what an address or a folder would take for something else is not.
        let plain = |segment: &str| {
            !segment.is_empty() && segment != "." && segment != ".." && segment.chars().all(|c| !c.is_control() && !"?#%*\\".contains(c))
        };
        if folder.len() > 1024 || !(folder.is_empty() || folder.split('/').all(plain)) {
            return wrong("the folder is no plain path");
        }
        Ok(Self { store, bucket: bucket.to_owned(), folder: folder.to_owned() })
    }
}

impl fmt::Display for BucketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.store.scheme(), self.bucket)?;
        if self.folder.is_empty() { Ok(()) } else { write!(f, "/{}", self.folder) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_place_in_a_bucket_is_read_and_shown() {
        for (path, store, bucket, folder) in [
            ("s3://models/rm/seed 0", Store::S3, "models", "rm/seed 0"),
            ("gs://a-b.c", Store::Gcs, "a-b.c", ""),
            ("az://c/step=100", Store::Azure, "c", "step=100"),
        ] {
            let found: BucketPath = path.parse().expect("a path");
            assert_eq!((found.store, found.bucket.as_str(), found.folder.as_str()), (store, bucket, folder));
            assert_eq!(found.to_string(), path);
        }
        assert_eq!("s3://b/x//".parse::<BucketPath>().map(|path| path.folder), Ok("x".to_owned()));
        for wrong in ["s3://", "s3:///x", "s3://b/../x", "s3://b//x", "s3://b/x?y", "s3://b/x%2Fy", "s3://b:80/x", "http://b/x"] {
            let problem = wrong.parse::<BucketPath>().expect_err(wrong);
            assert!(problem.contains("expected s3://bucket/folder"), "{problem}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_shown_alike_and_nothing_panics(rest in "[ -~]{0,40}") {
            if let Ok(path) = format!("s3://{rest}").parse::<BucketPath>() {
                prop_assert_eq!(path.to_string().parse::<BucketPath>(), Ok(path));
            }
        }
    }
}
