//! Errors of other crates as one line.

use std::error::Error;

/// The error with its causes. Some libraries repeat the cause in the error's own text, others leave it out.
pub(crate) fn whole(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn causes_are_said_once() {
        assert_eq!(whole(&Outer(io::Error::other("inner"))), "outer: inner");
        assert_eq!(whole(&Outer(io::Error::other("out"))), "outer");
    }
}
