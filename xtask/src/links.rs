//! Relative links in the Markdown documents must lead somewhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// Looks at every document of the repository.
pub(crate) fn check() -> Result<()> {
    let mut broken = Vec::new();
    let mut documents = Vec::new();
    collect(&cmd::root(), &mut documents)?;
    for document in &documents {
        let text = fs::read_to_string(document).with_context(|| document.display().to_string())?;
        let dir = document.parent().unwrap_or(Path::new("."));
        for target in targets(&text) {
            if !dir.join(target).exists() {
                broken.push(format!("{}: {target}", document.display()));
            }
        }
    }
    if !broken.is_empty() {
        bail!("links to files that do not exist:\n{}", broken.join("\n"));
    }
    Ok(())
}

fn collect(dir: &Path, documents: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type()?.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                collect(&path, documents)?;
            }
        } else if path.extension().is_some_and(|e| e == "md") {
            documents.push(path);
        }
    }
    Ok(())
}

/// The relative targets of a document's links, without anchors; code blocks are not looked at.
fn targets(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        for rest in line.split("](").skip(1) {
            let Some((target, _)) = rest.split_once(')') else { continue };
            let target = target.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                found.push(target);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::targets;

    #[test]
    fn only_relative_links_outside_of_code_count() {
        let text = "[a](b.md) and [c](d/e.md#f) [g](#h) [i](https://j)\n```\n[k](l)\n```\n[m](n)";
        assert_eq!(targets(text), ["b.md", "d/e.md", "n"]);
    }
}
