//! Names that stand for several servers.

use std::collections::BTreeSet;

use super::ClientError;

/// Every address that `names` stands for, in order and each once: `dns:///host:port` and `host:port` are looked up, several
/// names go by commas. An error where one of them cannot be found, or where there is none.
pub async fn addresses_of(names: &str) -> Result<Vec<String>, ClientError> {
    let wrong = |name: &str, problem: String| ClientError::Address { address: name.to_owned(), problem };
    let mut addresses = BTreeSet::new();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let host = name.strip_prefix("dns:///").unwrap_or(name);
        let found = tokio::net::lookup_host(host).await.map_err(|error| wrong(name, error.to_string()))?;
        addresses.extend(found.map(|address| address.to_string()));
    }
    if addresses.is_empty() { Err(wrong(names, "it stands for no address".to_owned())) } else { Ok(addresses.into_iter().collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_addresses_in_order_and_each_of_them_once() {
        let found = addresses_of("127.0.0.1:9, dns:///127.0.0.1:7,127.0.0.1:9").await.expect("addresses");
        assert_eq!(found, ["127.0.0.1:7", "127.0.0.1:9"]);
        for (names, words) in [("", "no address"), (" , ", "no address"), ("127.0.0.1", "address `127.0.0.1`")] {
            let error = addresses_of(names).await.expect_err("not addresses").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
