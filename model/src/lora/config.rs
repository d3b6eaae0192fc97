//! Which layers an adapter changes and how strongly.

use std::fmt;
use std::str::FromStr;

use crate::ModelConfig;

/// A linear layer inside a transformer block, by its Hugging Face name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum LinearKind {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl LinearKind {
    /// Every kind, in the order of a forward pass.
    pub const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// Whether it gives keys or values, which a layer has of every token whatever tokens it is read of.
    pub(crate) fn is_of_every_token(self) -> bool {
        matches!(self, Self::KProj | Self::VProj)
    }

    /// `q_proj`, `k_proj`, …
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// `self_attn.q_proj`, `mlp.up_proj`, …: its path inside a block.
    pub fn path(self) -> String {
        let parent = match self {
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
            _ => "self_attn",
        };
        format!("{parent}.{}", self.name())
    }

    /// Output and input features.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        match self {
            Self::QProj => (q, hidden),
            Self::KProj | Self::VProj => (kv, hidden),
            Self::OProj => (hidden, q),
            Self::GateProj | Self::UpProj => (ffn, hidden),
            Self::DownProj => (hidden, ffn),
        }
    }
}

/// Which linear layers of every block an adapter changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetModules(Vec<LinearKind>);

impl TargetModules {
    /// The kinds, each once, in the order of a forward pass.
    pub fn kinds(&self) -> &[LinearKind] {
        &self.0
    }
}

impl Default for TargetModules {
    /// `q_proj` and `v_proj`, as published.
    fn default() -> Self {
        Self(vec![LinearKind::QProj, LinearKind::VProj])
    }
}

impl FromStr for TargetModules {
    type Err = String;

    /// A comma-separated list of names, or `all-linear`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all-linear" {
            return Ok(Self(LinearKind::ALL.to_vec()));
        }
        let mut kinds = text
            .split(',')
            .map(|name| parse_kind(name.trim()))
            .collect::<Result<Vec<_>, _>>()?;
        kinds.sort();
        kinds.dedup();
        Ok(Self(kinds))
    }
}

fn parse_kind(name: &str) -> Result<LinearKind, String> {
    if name == "all-linear" {
        return Err("all-linear stands for every linear layer: give it alone, without other names".to_owned());
    }
    LinearKind::ALL.into_iter().find(|k| k.name() == name).ok_or_else(|| {
        let known = LinearKind::ALL.map(LinearKind::name).join(", ");
        format!("no linear layer is called \"{name}\"; there are {known}, or all-linear for all of them")
    })
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|k| k.name()).collect();
        f.write_str(&names.join(","))
    }
}

/// The settings of an adapter, as in PEFT's `LoraConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of the two factors.
    pub r: usize,
    /// The low-rank term is multiplied by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Share of the low-rank term's inputs that training drops.
    pub lora_dropout: f64,
    /// Multiply by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// The layers.
    pub target_modules: TargetModules,
    /// It changes a sequence from the last place on where these tokens stand in it, and not at all where they do not
    /// (activated LoRA, arXiv 2504.12397; PEFT's `alora_invocation_tokens`). Empty: it changes all of it.
    pub invocation_tokens: Vec<u32>,
}

impl Default for LoraConfig {
    /// r 8, alpha 16, dropout 0.05 on `q_proj` and `v_proj`, as published.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            use_rslora: false,
            target_modules: TargetModules::default(),
            invocation_tokens: Vec::new(),
        }
    }
}

impl LoraConfig {
    /// What the low-rank term is multiplied by.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// The first of `tokens`, a whole sequence so far, that the adapter changes: where its invocation tokens stand for the last
    /// time, and `usize::MAX` where they do not; 0 of an adapter without.
    pub fn active_from(&self, tokens: &[u32]) -> usize {
        match self.invocation_tokens.as_slice() {
            [] => 0,
            invocation => {
                let mut places = tokens.windows(invocation.len());
                places.rposition(|place| place == invocation).unwrap_or(usize::MAX)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_is_alpha_over_rank() {
        assert_eq!(LoraConfig::default().scale(), 2.0);
        let stabilised = LoraConfig {
            r: 16,
            use_rslora: true,
            ..LoraConfig::default()
        };
        assert_eq!(stabilised.scale(), 4.0);
    }

    #[test]
    fn an_adapter_begins_at_the_last_place_of_its_invocation_tokens() {
        let config = |tokens: &[u32]| LoraConfig {
            invocation_tokens: tokens.to_vec(),
            ..LoraConfig::default()
        };
        assert_eq!(config(&[]).active_from(&[4, 5]), 0);
        assert_eq!(config(&[4, 5]).active_from(&[4, 5, 6, 4, 5, 4]), 3);
        assert_eq!(config(&[4, 5]).active_from(&[4, 5]), 0);
        assert_eq!(config(&[4, 5]).active_from(&[4]), usize::MAX);
        assert_eq!(config(&[4, 5]).active_from(&[5, 4, 6]), usize::MAX);
    }

    #[test]
    fn modules_are_named_as_in_peft() {
        let got: TargetModules = "v_proj, q_proj,q_proj".parse().expect("two known names");
        assert_eq!(got, TargetModules::default());
        let mixed = "q_proj,all-linear"
            .parse::<TargetModules>()
            .expect_err("one or the other");
        assert!(mixed.contains("give it alone"), "{mixed}");
        let err = "qproj".parse::<TargetModules>().expect_err("unknown");
        assert!(err.contains("q_proj, k_proj"), "{err}");
    }
}
