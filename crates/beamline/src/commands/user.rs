//! `beamline user`: manages the accounts that may sign in.

use crate::cli;
use crate::config::{Layers, load};
use crate::{secrets, wiring};
use anyhow::{Result, bail};
use std::io::{BufRead, IsTerminal, Write};

pub async fn add(name: String, args: cli::DataDir) -> Result<()> {
    let mut layers = Layers::from_process();
    layers.flags.extend(args.data_dir.map(|dir| ("data_dir", dir)));
    let settings = load(&layers)?;
    secrets::data_dir(&settings.data_dir)?;
    let config = wiring::bind::webapp_config(&settings)?;

    if std::io::stdin().is_terminal() {
        write!(std::io::stderr(), "password for {name}: ")?;
    }
    let mut password = String::new();
    std::io::stdin().lock().read_line(&mut password)?;
    let password = password.trim_end_matches(['\r', '\n']);

    if password.is_empty() {
        bail!("the password is empty; write it to standard input");
    }
    let user = webapp::add_user(&config, &name, password).await?;
    println!("{} may sign in", user.name);
    Ok(())
}
