//! Which series a PromQL expression reads, as far as names and matchers go.

/// One selector: a name, and the matchers in its braces.
#[derive(Clone, Debug, PartialEq)]
pub struct Selector {
    pub name: String,
    /// Label, operator, value.
    pub matchers: Vec<(String, String, String)>,
}

/// All selectors of our own and of process series.
pub fn selectors(expression: &str) -> Vec<Selector> {
    let mut found = Vec::new();
    let bytes = expression.as_bytes();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
    let mut i = 0;
    while i < bytes.len() {
        match bytes[i] {
            b'"' => i = end_of_text(bytes, i),
            b'{' => i = expression[i..].find('}').map_or(bytes.len(), |end| i + end + 1),
            byte if byte.is_ascii_alphabetic() || byte == b'_' => {
                let start = i;
                while i < bytes.len() && is_name(bytes[i]) {
                    i += 1;
                }
                let name = &expression[start..i];
                if ["warm_", "warm:", "process_"].iter().any(|prefix| name.starts_with(prefix)) || name == "up" {
                    let rest = &expression[i..];
                    let matchers = rest.strip_prefix('{').map(|rest| matchers(&rest[..closing(rest)])).unwrap_or_default();
                    found.push(Selector { name: name.to_owned(), matchers });
                }
            }
            _ => i += 1,
        }
    }
    found
}

fn end_of_text(bytes: &[u8], start: usize) -> usize {
    (start + 1..bytes.len()).find(|&i| bytes[i] == b'"' && bytes[i - 1] != b'\\').map_or(bytes.len(), |end| end + 1)
}

/// The end of the matchers, which may hold braces in texts.
fn closing(text: &str) -> usize {
    let mut inside = false;
    for (i, c) in text.char_indices() {
        match c {
            '"' => inside = !inside,
            '}' if !inside => return i,
            _ => {}
        }
    }
    text.len()
}

fn matchers(text: &str) -> Vec<(String, String, String)> {
    let parts = text.split("\",").map(|part| part.trim().trim_end_matches('"')).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let operator = ["!~", "=~", "!=", "="].into_iter().find(|operator| part.contains(operator)).expect("an operator");
            let (label, value) = part.split_once(operator).expect("an operator");
            (label.trim().to_owned(), operator.to_owned(), value.trim().trim_matches('"').to_owned())
        })
        .collect()
}

#[test]
fn selectors_are_found_with_their_matchers_and_texts_are_not() {
    let found = selectors(
        "sum by (job) (rate(warm_a_total{code=~\"X|Y\",rpc=\"Score\"}[5m])) / on (job) warm:b:sum > 1 and label_replace(up, \"warm_c\", \"\", \"\", \"\")",
    );
    let names: Vec<&str> = found.iter().map(|selector| selector.name.as_str()).collect();
    assert_eq!(names, ["warm_a_total", "warm:b:sum", "up"]);
    let matcher = |label: &str, operator: &str, value: &str| (label.to_owned(), operator.to_owned(), value.to_owned());
    assert_eq!(found[0].matchers, [matcher("code", "=~", "X|Y"), matcher("rpc", "=", "Score")]);
}
