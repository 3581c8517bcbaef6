//! `hf:org/name@revision[/subdir]`, checked: every part of it becomes part of an address and of a path on the disk.

use std::fmt;
use std::str::FromStr;

use super::HUB;

/// A folder in a repository of a hub, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubPath {
    repository: String,
    revision: String,
    /// Without slashes at its ends; empty for the repository's own folder.
    subdir: String,
}

/// A text that names no place on a hub.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path:?}: {problem}; expected hf:org/name@revision, with a folder after it where the checkpoint lies in one")]
pub struct InvalidHubPath {
    path: String,
    problem: String,
}

impl InvalidHubPath {
    /// What is wrong, for those who name the path themselves.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl FromStr for HubPath {
    type Err = InvalidHubPath;

    fn from_str(path: &str) -> Result<Self, InvalidHubPath> {
        let wrong = |problem: &str| InvalidHubPath { path: path.chars().take(200).collect(), problem: problem.to_owned() };
        let rest = path.strip_prefix(HUB).ok_or_else(|| wrong("does not begin with hf:"))?;
        let (repository, revision, subdir) = match rest.split_once('@') {
            Some((repository, rest)) => {
                let (revision, subdir) = rest.split_once('/').unwrap_or((rest, ""));
                (repository.to_owned(), revision, subdir)
            }
            None => {
                let mut parts = rest.splitn(3, '/');
                let repository = [parts.next(), parts.next()].into_iter().flatten().collect::<Vec<_>>().join("/");
                (repository, "main", parts.next().unwrap_or(""))
            }
        };
        let names: Vec<&str> = repository.split('/').collect();
        if names.len() != 2 || !names.iter().all(|name| is_segment(name)) {
            return Err(wrong("the repository is no org/name"));
        }
        // A branch with a slash in its name is written with %2F, as in the hub's own addresses.
        if !is_segment(&revision.replace("%2F", "-")) {
            return Err(wrong("the revision is no branch, tag or commit"));
        }
        let subdir = subdir.trim_end_matches('/');
        if !subdir.is_empty() && !subdir.split('/').all(is_segment) {
            return Err(wrong("the folder is no plain path"));
        }
        Ok(Self { repository, revision: revision.to_owned(), subdir: subdir.to_owned() })
    }
}

/// A name that can stand in an address and on a disk, and leads nowhere else.
pub(super) fn is_segment(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.') && !name.contains("..")
}

impl HubPath {
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn revision(&self) -> &str {
        &self.revision
    }

    pub fn subdir(&self) -> &str {
        &self.subdir
    }

    /// The same place at this commit.
    pub fn at(&self, commit: &str) -> Self {
        Self { revision: commit.to_owned(), ..self.clone() }
    }
}

impl fmt::Display for HubPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HUB}{}@{}", self.repository, self.revision)?;
        if self.subdir.is_empty() { Ok(()) } else { write!(f, "/{}", self.subdir) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(path: &str) -> HubPath {
        path.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn revision_and_folder_are_optional() {
        let full = parse("hf:org/name@v1.0/seeds/seed-0");
        assert_eq!((full.repository(), full.revision(), full.subdir()), ("org/name", "v1.0", "seeds/seed-0"));
        let bare = parse("hf:org/name");
        assert_eq!((bare.revision(), bare.subdir()), ("main", ""));
        assert_eq!(parse("hf:org/name/sub").subdir(), "sub");
        assert_eq!(parse("hf:org/name@refs%2Fpr%2F3").revision(), "refs%2Fpr%2F3");
        assert_eq!(full.at("abc").to_string(), "hf:org/name@abc/seeds/seed-0");
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for wrong in [
            "org/name",
            "hf:",
            "hf:name",
            "hf:../name",
            "hf:org/..",
            "hf:org/name@",
            "hf:org/name@a b",
            "hf:org/name@../x",
            "hf:org/name@v1/../../etc",
            "hf:org/name@v1//x",
            "hf:org/name@v1/.git",
            "hf:org/na me@v1",
            "hf:org/name?x@v1",
        ] {
            assert!(wrong.parse::<HubPath>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_and_never_climbs(path in "hf:[a-z./@%_2F-]{0,40}") {
            if let Ok(read) = path.parse::<HubPath>() {
                prop_assert_eq!(&read, &parse(&read.to_string()));
                for part in [read.repository(), read.revision(), read.subdir()] {
                    prop_assert!(part.split('/').all(|segment| segment != ".." && segment != "."), "{part}");
                }
            }
        }
    }
}
