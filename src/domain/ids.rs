//! Names of things: members, weights, generations.

use std::fmt;

/// The name of one member of the merge: 1 to 128 bytes of letters, digits, `.`, `_`, `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberName(String);

/// A string that cannot name a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("member name {0:?}: expected 1 to 128 letters, digits, '.', '_' or '-'")]
pub struct InvalidMemberName(pub String);

impl TryFrom<String> for MemberName {
    type Error = InvalidMemberName;

    fn try_from(name: String) -> Result<Self, InvalidMemberName> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if (1..=128).contains(&name.len()) && name.bytes().all(allowed) { Ok(Self(name)) } else { Err(InvalidMemberName(name)) }
    }
}

impl MemberName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// BLAKE3 over everything that the merged weights depend on: every input tensor and the resolved recipe.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightsId(pub [u8; 32]);

/// BLAKE3 over everything that a score depends on: weights, run dtype, architecture, tokenizer, template, text policy,
/// pooling, head, calibration and the version of the score's own semantics.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Reads 64 hexadecimal digits, as they are printed or in capitals.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let digits: Vec<u8> = text.bytes().map(digit).collect::<Option<_>>()?;
        let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
        if digits.len() == 64 { bytes.try_into().ok().map(Self) } else { None }
    }
}

impl fmt::Display for WeightsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for WeightsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Counts the generations of one process, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GenerationId(pub u64);

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_name_is_short_and_plain() {
        assert!(MemberName::try_from("rm-0_v1.2".to_owned()).is_ok());
        for bad in ["", "a b", "a/b", "ü", &"x".repeat(129)] {
            assert!(MemberName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_print_as_hex_and_are_read_again() {
        let id = WeightsId([0xab; 32]);
        assert_eq!(id.to_string(), "ab".repeat(32));
        let mut bytes = [0; 32];
        bytes.iter_mut().zip(7..).for_each(|(byte, value)| *byte = value);
        let fingerprint = Fingerprint(bytes);
        assert_eq!(Fingerprint::from_hex(&fingerprint.to_string()), Some(fingerprint));
        assert_eq!(Fingerprint::from_hex(&fingerprint.to_string().to_uppercase()), Some(fingerprint));
        for bad in ["", "ab", &"ab".repeat(33), &"0g".repeat(32), &format!("{}ü", "a".repeat(62))] {
            assert_eq!(Fingerprint::from_hex(bad), None, "{bad}");
        }
    }
}
