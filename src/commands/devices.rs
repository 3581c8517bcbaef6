//! `warm devices`: what this machine and this build can compute on.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::CommandError;
use crate::app::memory_limit;
use crate::model::{DeviceError, Inventory, Support, inventory};

#[derive(Debug, clap::Args)]
pub(super) struct DevicesArgs {
    /// The list as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &DevicesArgs) -> Result<ExitCode, CommandError> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (inventory, memory) = (inventory(), memory_limit());
    if arguments.json {
        println!("{:#}", as_json(&inventory, cores, memory)?);
    } else {
        print!("{}", as_text(&inventory, cores, memory));
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(inventory: &Inventory, cores: usize, memory: u64) -> Result<Value, CommandError> {
    let cards = serde_json::to_value(&inventory.cards).map_err(|error| CommandError::Other(error.to_string()))?;
    let Support { cuda, flash_attention, metal } = inventory.support;
    Ok(json!({
        "build": {"cuda": cuda, "flash_attention": flash_attention, "metal": metal},
        "cpu": {"device": "cpu", "cores": cores, "memory_bytes": memory},
        "cuda": cards,
        "cuda_silent": inventory.silent.iter().map(|card| json!({"device": card.place, "problem": card.problem})).collect::<Vec<_>>(),
        "cuda_problem": inventory.problem,
    }))
}

fn as_text(inventory: &Inventory, cores: usize, memory: u64) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let has = |yes: bool| if yes { "yes" } else { "no" };
    let Support { cuda, flash_attention, metal } = inventory.support;
    let mut text = format!("this build: cuda {}, flash attention {}, metal {}\n", has(cuda), has(flash_attention), has(metal));
    let cores = if cores == 1 { "1 core".to_owned() } else { format!("{cores} cores") };
    text.push_str(&format!("cpu     {cores}, {:.1} GiB of memory\n", gib(memory)));
    for card in &inventory.cards {
        let (free, total) = (gib(card.free_bytes), gib(card.total_bytes));
        text.push_str(&format!(
            "{:7} {}, compute capability {}, {total:.1} GiB of memory, {free:.1} GiB free\n",
            card.device, card.name, card.compute_capability
        ));
    }
    for DeviceError { place, problem } in &inventory.silent {
        text.push_str(&format!("{place:7} does not answer: {problem}\n"));
    }
    match &inventory.problem {
        Some(problem) => text.push_str(&format!("no CUDA device: {problem}\n")),
        None if inventory.cards.is_empty() && inventory.silent.is_empty() => text.push_str("no CUDA device: the driver has none\n"),
        None => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Card;

    fn with_card() -> Inventory {
        let card = Card {
            device: "cuda:0".to_owned(),
            name: "NVIDIA H100".to_owned(),
            compute_capability: "9.0".to_owned(),
            free_bytes: 70 << 30,
            total_bytes: 80 << 30,
        };
        Inventory {
            support: Support { cuda: true, flash_attention: false, metal: false },
            cards: vec![card],
            silent: Vec::new(),
            problem: None,
        }
    }

    #[test]
    fn a_card_is_told_with_its_memory() {
        let text = as_text(&with_card(), 2, 16 << 30);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "this build: cuda yes, flash attention no, metal no",
                "cpu     2 cores, 16.0 GiB of memory",
                "cuda:0  NVIDIA H100, compute capability 9.0, 80.0 GiB of memory, 70.0 GiB free",
            ]
        );
        let json = as_json(&with_card(), 2, 16 << 30).expect("JSON");
        assert_eq!((&json["cuda"][0]["free_bytes"], &json["cuda_problem"]), (&json!(70u64 << 30), &Value::Null));
    }

    #[test]
    fn a_card_that_does_not_answer_is_told_beside_those_that_do() {
        let silent = vec![DeviceError { place: "cuda:1".to_owned(), problem: "CUDA_ERROR_ECC_UNCORRECTABLE".to_owned() }];
        let inventory = Inventory { silent, ..with_card() };
        let text = as_text(&inventory, 2, 16 << 30);
        assert!(text.contains("cuda:0  NVIDIA H100"), "{text}");
        assert!(text.ends_with("\ncuda:1  does not answer: CUDA_ERROR_ECC_UNCORRECTABLE\n"), "{text}");
        assert_eq!(as_json(&inventory, 2, 0).expect("JSON")["cuda_silent"][0]["device"], "cuda:1");
    }

    #[test]
    fn why_there_is_no_card_is_told_in_a_sentence() {
        let none = Inventory { cards: Vec::new(), problem: Some("no NVIDIA driver answers".to_owned()), ..with_card() };
        assert!(as_text(&none, 1, 0).ends_with("no CUDA device: no NVIDIA driver answers\n"));
        assert_eq!(as_json(&none, 1, 0).expect("JSON")["cuda_problem"], "no NVIDIA driver answers");
    }
}
