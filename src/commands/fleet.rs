//! `warm reload`, `warm activate` and `warm status`: one running server, or all replicas behind one name.

use std::collections::BTreeSet;
use std::fmt;
use std::process::ExitCode;

use clap::Args;
use tokio::task::JoinSet;

use super::{CommandError, runtime};
use crate::client::{Client, ClientError, addresses_of};
use crate::wire::{self, generation::State};

/// Which servers.
#[derive(Clone, Debug, Args)]
pub(super) struct Targets {
    /// One server.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051", conflicts_with = "all")]
    addr: String,
    /// Every address that a name stands for, such as dns:///warm-headless:50051; or several addresses, by commas.
    #[arg(long, value_name = "NAME")]
    all: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ReloadArgs {
    #[command(flatten)]
    targets: Targets,
    /// Plan and name only; nothing is loaded.
    #[arg(long)]
    dry_run: bool,
    /// Load and check, but leave the live generation live.
    #[arg(long)]
    stage_only: bool,
}

#[derive(Debug, Args)]
pub(super) struct ActivateArgs {
    #[command(flatten)]
    targets: Targets,
    /// The generation's fingerprint, or its first digits, at least 8.
    #[arg(long, value_name = "HEX")]
    fingerprint: String,
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    targets: Targets,
}

pub(super) fn reload(arguments: ReloadArgs) -> Result<ExitCode, CommandError> {
    let ReloadArgs { targets, dry_run, stage_only } = arguments;
    runtime()?.block_on(async {
        let mut reloads = JoinSet::new();
        for address in targets.resolve().await? {
            reloads.spawn(async move {
                let result = reload_one(&address, wire::ReloadRequest { dry_run, stage_only }).await;
                (address, result)
            });
        }
        let mut failed = false;
        while let Some(ended) = reloads.join_next().await {
            let (address, result) = ended.map_err(|panic| CommandError::Other(panic.to_string()))?;
            if let Err(error) = result {
                eprintln!("{address}  {error}");
                failed = true;
            }
        }
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

async fn reload_one(address: &str, request: wire::ReloadRequest) -> Result<(), ClientError> {
    let client = Client::connect(address).await?;
    let last = client.reload(request, |step| println!("{address}  {}", Step(step))).await?;
    if let Some(stamp) = last.result.and_then(|generation| generation.stamp) {
        println!("{address}  fingerprint {}", stamp.fingerprint);
    }
    Ok(())
}

/// One step on one line.
struct Step<'a>(&'a wire::ReloadProgress);

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire::ReloadProgress { stage, done, total, message, outcome, .. } = self.0;
        write!(f, "{stage}")?;
        if *total > 0 {
            write!(f, " {:.0} %", 100.0 * *done as f64 / *total as f64)?;
        }
        if !outcome.is_empty() {
            write!(f, " ({outcome})")?;
        }
        if message.is_empty() { Ok(()) } else { write!(f, ": {}", message.replace('\n', "\n    ")) }
    }
}

pub(super) fn activate(arguments: ActivateArgs) -> Result<ExitCode, CommandError> {
    let ActivateArgs { targets, fingerprint } = arguments;
    runtime()?.block_on(async {
        let fleet = Fleet::ask(targets.resolve().await?).await?;
        // Nothing is swapped before every replica is known to be able to.
        let fingerprint = fleet.name(&fingerprint).map_err(CommandError::Other)?;
        let before = fleet.live();
        fleet.ready_for(&fingerprint).map_err(CommandError::Other)?;
        let mut swaps = JoinSet::new();
        for replica in &fleet.0 {
            if let Ok((client, _)) = &replica.seen {
                let (address, client, fingerprint) = (replica.address.clone(), client.clone(), fingerprint.clone());
                swaps.spawn(async move { (address, client.activate(&fingerprint).await) });
            }
        }
        let (mut failed, all) = (0, swaps.len());
        while let Some(ended) = swaps.join_next().await {
            let (address, result) = ended.map_err(|panic| CommandError::Other(panic.to_string()))?;
            match result {
                Ok(_) => println!("{address}  {} is live", short(&fingerprint)),
                Err(error) => {
                    eprintln!("{address}  {error}");
                    failed += 1;
                }
            }
        }
        if failed == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        let back = before.iter().find(|live| **live != fingerprint).map_or(String::new(), |live| format!(", or go back to {live}"));
        Err(CommandError::Other(format!("{failed} of {all} servers did not swap: activate it once more{back}")))
    })
}

pub(super) fn status(arguments: StatusArgs) -> Result<ExitCode, CommandError> {
    runtime()?.block_on(async {
        let fleet = Fleet::ask(arguments.targets.resolve().await?).await?;
        print!("{fleet}");
        let reachable = fleet.0.iter().all(|replica| replica.seen.is_ok());
        Ok(if reachable && fleet.live().len() == 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

impl Targets {
    async fn resolve(&self) -> Result<Vec<String>, CommandError> {
        match &self.all {
            None => Ok(vec![self.addr.clone()]),
            Some(all) => Ok(addresses_of(all).await?),
        }
    }
}

/// One server, and what it says of itself.
struct Replica {
    address: String,
    seen: Result<(Client, Vec<wire::Generation>), ClientError>,
}

/// All servers that were asked, in the order of their addresses.
struct Fleet(Vec<Replica>);

impl Fleet {
    async fn ask(addresses: Vec<String>) -> Result<Self, CommandError> {
        let mut asked = JoinSet::new();
        for address in addresses {
            asked.spawn(async move {
                let seen = async {
                    let client = Client::connect(&address).await?;
                    let generations = client.list_generations().await?;
                    Ok((client, generations))
                };
                let seen = seen.await;
                Replica { address, seen }
            });
        }
        let mut replicas = Vec::new();
        while let Some(replica) = asked.join_next().await {
            replicas.push(replica.map_err(|panic| CommandError::Other(panic.to_string()))?);
        }
        replicas.sort_by(|one, other| one.address.cmp(&other.address));
        Ok(Self(replicas))
    }

    /// The fingerprints that are live somewhere.
    fn live(&self) -> BTreeSet<String> {
        self.0.iter().flat_map(|replica| replica.in_state(&[State::Live])).map(str::to_owned).collect()
    }

    /// The whole fingerprint that these digits begin.
    fn name(&self, digits: &str) -> Result<String, String> {
        let digits = digits.to_ascii_lowercase();
        if digits.len() == 64 {
            return Ok(digits);
        }
        if digits.len() < 8 {
            return Err(format!("fingerprint {digits}: expected at least 8 digits"));
        }
        let known: BTreeSet<&str> = self.0.iter().flat_map(|replica| replica.in_state(&HERE)).collect();
        let found: Vec<&&str> = known.iter().filter(|known| known.starts_with(&digits)).collect();
        match found.as_slice() {
            [one] => Ok((**one).to_owned()),
            [] => Err(format!("no generation here has a fingerprint that begins with {digits}")),
            several => Err(format!("{} generations have a fingerprint that begins with {digits}", several.len())),
        }
    }

    /// Refuses, naming them, while some servers cannot be reached or do not have this generation.
    fn ready_for(&self, fingerprint: &str) -> Result<(), String> {
        let why = |replica: &Replica| match &replica.seen {
            Err(error) => Some(format!("{}: {error}", replica.address)),
            Ok(_) if replica.in_state(&HERE).any(|here| here == fingerprint) => None,
            Ok(_) => Some(format!("{}: has not staged it", replica.address)),
        };
        let missing: Vec<String> = self.0.iter().filter_map(why).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let (count, all) = (missing.len(), self.0.len());
        Err(format!("{} is not on {count} of {all} servers, so none is swapped:\n  {}", short(fingerprint), missing.join("\n  ")))
    }
}

/// The states in which a generation can be made live.
const HERE: [State; 3] = [State::Staged, State::Live, State::Held];

impl Replica {
    fn in_state<'a>(&'a self, states: &'a [State]) -> impl Iterator<Item = &'a str> {
        let generations = self.seen.iter().flat_map(|(_, generations)| generations);
        let wanted = generations.filter(|generation| states.contains(&generation.state()));
        wanted.filter_map(|generation| Some(generation.stamp.as_ref()?.fingerprint.as_str()))
    }
}

impl fmt::Display for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|replica| replica.address.len()).max().unwrap_or(0).max(7);
        writeln!(f, "{:width$}  {:12}  {:>10}  {:12}  {:25}  instance", "address", "live", "generation", "staged", "held")?;
        for Replica { address, seen } in &self.0 {
            let generations = match seen {
                Ok((_, generations)) => generations,
                Err(error) => {
                    writeln!(f, "{address:width$}  {error}")?;
                    continue;
                }
            };
            let of = |state: State| {
                let stamps = generations.iter().filter(move |generation| generation.state() == state);
                stamps.filter_map(|generation| generation.stamp.as_ref())
            };
            let names = |state| of(state).map(|stamp| short(&stamp.fingerprint)).collect::<Vec<_>>().join(" ");
            let live = of(State::Live).next();
            let number = live.map_or(String::new(), |stamp| stamp.generation.to_string());
            let instance = generations.first().and_then(|generation| generation.stamp.as_ref()).map_or("", |stamp| stamp.instance.as_str());
            let (live, staged, held) = (names(State::Live), names(State::Staged), names(State::Held));
            writeln!(f, "{address:width$}  {live:12}  {number:>10}  {staged:12}  {held:25}  {instance}")?;
        }
        match (self.0.len(), self.live().len()) {
            (servers, 0) => writeln!(f, "{servers} servers, nothing live"),
            (servers, 1) => writeln!(f, "{servers} servers, one model live"),
            (servers, models) => writeln!(f, "{servers} servers differ: {models} models live"),
        }
    }
}

/// The first digits, enough to tell generations apart.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs a runtime: the client connects when it is first used, which it never is.
    fn replica(address: &str, generations: &[(&str, State)]) -> Replica {
        let client = Client::over(tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy());
        let generation = |(name, state): &(&str, State)| {
            let stamp = wire::ModelStamp { fingerprint: name.repeat(32), instance: "pod".to_owned(), generation: 3, ..Default::default() };
            wire::Generation { stamp: Some(stamp), state: (*state).into(), ..Default::default() }
        };
        Replica { address: address.to_owned(), seen: Ok((client, generations.iter().map(generation).collect())) }
    }

    fn unreachable_at(address: &str) -> Replica {
        let problem = ClientError::Connect { address: address.to_owned(), problem: "refused".to_owned() };
        Replica { address: address.to_owned(), seen: Err(problem) }
    }

    #[tokio::test]
    async fn a_fleet_is_refused_while_one_server_has_not_staged_it() {
        let fleet = Fleet(vec![
            replica("a:1", &[("ab", State::Staged), ("cd", State::Live)]),
            replica("b:1", &[("ab", State::Gone), ("cd", State::Live)]),
            unreachable_at("c:1"),
        ]);
        let refused = fleet.ready_for(&"ab".repeat(32)).expect_err("not everywhere");
        assert!(refused.contains("2 of 3") && refused.contains("b:1: has not staged it") && refused.contains("c:1: "), "{refused}");
        let reached = Fleet(fleet.0.into_iter().take(2).collect());
        assert_eq!(reached.ready_for(&"cd".repeat(32)), Ok(()), "live already is ready, too");
    }

    #[tokio::test]
    async fn the_first_digits_name_a_generation_where_they_are_enough() {
        let fleet = Fleet(vec![replica("a:1", &[("ab", State::Staged), ("cd", State::Held)])]);
        assert_eq!(fleet.name("ABABABAB"), Ok("ab".repeat(32)));
        assert_eq!(fleet.name(&"ee".repeat(32)), Ok("ee".repeat(32)), "a whole one is taken as it is");
        assert!(fleet.name("ababab").expect_err("short").contains("at least 8"));
        assert!(fleet.name("eeeeeeee").expect_err("unknown").contains("no generation"));
    }

    #[tokio::test]
    async fn the_table_shows_who_differs() {
        let fleet = Fleet(vec![
            replica("10.0.0.1:50051", &[("ab", State::Live), ("cd", State::Held)]),
            replica("10.0.0.2:50051", &[("cd", State::Live), ("ab", State::Staged)]),
            unreachable_at("10.0.0.3:50051"),
        ]);
        let table = fleet.to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 5, "{table}");
        assert!(lines[1].starts_with("10.0.0.1:50051  abababababab           3                cdcdcdcdcdcd"), "{table}");
        assert!(lines[3].contains("refused"), "{table}");
        assert_eq!(lines[4], "3 servers differ: 2 models live");
    }
}
