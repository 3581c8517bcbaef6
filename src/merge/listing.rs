//! Long lists of tensors in sentences: the first are told, the rest is counted.

/// How many tensors are listed for one reason before the rest is counted.
const LISTED: usize = 20;

/// The first names of a list.
pub fn listed<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    let more = names.len().saturating_sub(LISTED);
    let shown = names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// Sentences of one kind about one member: the first are listed, the rest is counted.
#[derive(Default)]
pub struct Listing {
    sentences: Vec<String>,
    count: usize,
}

impl Listing {
    pub fn push(&mut self, sentence: String) {
        self.count += 1;
        if self.count <= LISTED {
            self.sentences.push(sentence);
        }
    }

    pub fn finish(self, name: &str, problems: &mut Vec<String>) {
        problems.extend(self.sentences);
        if self.count > LISTED {
            problems.push(format!("{name}: and {} more tensors like the last", self.count - LISTED));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_of_tensors_is_cut_and_counted() {
        let mut listing = Listing::default();
        (0..27).for_each(|index| listing.push(format!("problem {index}")));
        let mut problems = Vec::new();
        listing.finish("member \"a\"", &mut problems);
        let last = problems[20].as_str();
        assert_eq!((problems.len(), problems[19].as_str(), last), (21, "problem 19", "member \"a\": and 7 more tensors like the last"));
    }
}
