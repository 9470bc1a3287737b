//! Numbers among the options of a program.

/// A number of at least `least`; the error names the option.
pub fn parse<T>(option: &str, text: &str, least: T) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    match text.trim().parse::<T>() {
        Ok(number) if number >= least => Ok(number),
        _ => Err(format!(
            "{option}: \"{text}\" is not a number of at least {least}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_a_least() {
        assert_eq!(parse("--repeat", "3", 1), Ok(3));
        for wrong in ["0", "-1", "many", "", "99999999999999999999"] {
            let why = parse("--repeat", wrong, 1_usize).unwrap_err();
            assert!(why.starts_with("--repeat: "), "{why}");
        }
    }
}
