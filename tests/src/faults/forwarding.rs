//! Packets.
use anyhow::Result;
use super::Options;
/// x
pub fn run(_: &Options) -> Result<serde_json::Value> { Ok(serde_json::json!({})) }
