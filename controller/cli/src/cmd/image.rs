//! Images and templates.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, bail};
use muster_api::{
    BootFiles, ChangeLimits, ChangeTemplate, CommitImage, CreateTemplate, DiskLimits, Endpoint, Estimate,
    EstimateRequest, Image, ImageFormat as Format, ImportByPath, ImportQuery, Job, JobState, NetworkMode, PullImage,
    TargetKind, Template, Upload, Verb, WhenFull,
};
use muster_common::{ByteLen, ErrorCode};

use super::{Session, command};
use crate::{
    Ended,
    args::{self, ImageFormat, ImageVerb, TemplateVerb},
    output::{Table, print, print_deleted},
    progress::{StatusLine, bar, job_line},
};

pub async fn run(session: &Session, verb: ImageVerb) -> anyhow::Result<Ended> {
    let client = &session.client;
    match verb {
        ImageVerb::Ls => {
            print(session.output, &client.all_images().await?, |images| list(images))?;
        }
        ImageVerb::Show { image } => print(session.output, &client.image(&image).await?, show)?,
        ImageVerb::Import { file, estimate: true, format, .. } => {
            estimate(session, &file, format, Vec::new()).await?;
        }
        ImageVerb::Import { file, estimate: false, name, format, new_revision, kernel, initrd, cmdline } => {
            let name = match name {
                Some(name) => name,
                None => file
                    .file_stem()
                    .and_then(|s| s.to_str())
                    .map(str::to_string)
                    .with_context(|| format!("make a name of {} (say --name)", file.display()))?,
            };
            let started = super::now_us();
            let asked = ImportQuery { name, format: format.into(), cmdline, new_revision, ..ImportQuery::default() };
            let image: Image = import(session, &file, asked, kernel.as_deref(), initrd.as_deref())
                .await
                .and_then(finish)
                .with_context(|| format!("import {}", file.display()))?;
            let took = super::now_us().saturating_sub(started);
            print(session.output, &image, |i| {
                format!(
                    "{}@{}: {} logical, {} in 4 KiB blocks that are unique, {} new in the repository, imported in {}\n",
                    i.name,
                    i.revision,
                    ByteLen(i.logical_bytes),
                    ByteLen(i.resident_estimate_bytes),
                    ByteLen(i.new_bytes),
                    crate::output::duration(took)
                )
            })?;
        }
        ImageVerb::Estimate { file, format, beside } => estimate(session, &file, format, beside).await?,
        ImageVerb::Export { image, file, format, force } => {
            super::export::run(session, &image, &file, format, force).await?;
        }
        ImageVerb::Commit { vm, name, new_revision, timeout } => {
            let timeout_seconds = Some(u32::try_from(timeout).unwrap_or(u32::MAX));
            let commit = CommitImage { vm: vm.clone(), name, new_revision, timeout_seconds };
            let job = client.commit_image(&commit).await?;
            let image: Image =
                follow_job(session, &job).await.and_then(finish).with_context(|| format!("commit {vm}"))?;
            print(session.output, &image, |i| {
                let mut text = format!(
                    "{}@{}: {} logical, {} in 4 KiB blocks that are unique, {} new in the repository, from {}",
                    i.name,
                    i.revision,
                    ByteLen(i.logical_bytes),
                    ByteLen(i.resident_estimate_bytes),
                    ByteLen(i.new_bytes),
                    i.origin
                );
                if !i.parent_name.is_empty() {
                    text += &format!(", made from {}", i.parent_name);
                }
                text + "\n"
            })?;
        }
        ImageVerb::Pull { image, target } => {
            let pull =
                PullImage { target: target.targets.clone(), timeout_seconds: Some(command::seconds(&target.deadline)) };
            let order = client.pull_image(&image, &pull, Some(&command::idempotency_key())).await?;
            return command::finish(session, &order, &target.deadline).await;
        }
        ImageVerb::Drop { image, target } => {
            let digest = client.image(&image).await?.digest.to_string();
            let arguments = [("digest".to_string(), digest.into())].into();
            return command::order(session, Verb::ImageDrop, TargetKind::Host, target, arguments).await;
        }
        ImageVerb::Verify { image } => {
            let job = client.verify_image(&image).await?;
            let job = follow_job(session, &job).await?;
            let verified: serde_json::Value = finish(job)?;
            print(session.output, &verified, |_| format!("{image}: every chunk is what its digest says\n"))?;
        }
        ImageVerb::Delete { image } => {
            client.delete_image(&image).await?;
            print_deleted(session.output, &image)?;
        }
    }
    Ok(Ended::AllDone)
}

async fn estimate(session: &Session, file: &Path, format: ImageFormat, beside: Vec<String>) -> anyhow::Result<()> {
    let request = EstimateRequest { path: absolute(file)?, format: format.into(), beside };
    let estimate =
        session.client.estimate_file(&request).await.with_context(|| format!("estimate {}", file.display()))?;
    print(session.output, &estimate, estimated)?;
    Ok(())
}

fn estimated(e: &Estimate) -> String {
    let (logical, resident) = (ByteLen(e.logical_bytes), ByteLen(e.resident_bytes));
    let mut text = format!("{logical} logical, {resident} resident in an empty store\n");
    match e.added_bytes.map(ByteLen) {
        Some(added) if e.beside.is_empty() => {
            text += &format!("at most {added} more in a store that holds the repository's images\n");
        }
        Some(added) => text += &format!("{added} more in a store that holds {}\n", e.beside.join(", ")),
        None => {}
    }
    if let Some(new) = e.new_bytes {
        text += &format!("{} new in the repository\n", ByteLen(new));
    }
    if !e.too_large_for.is_empty() {
        text += &format!("too large for what is left in the stores of: {}\n", e.too_large_for.join(" "));
    }
    text
}

/// On one machine the controller reads the file itself, so that holes stay holes; what it may not or cannot read is sent.
async fn import(
    session: &Session,
    file: &Path,
    mut query: ImportQuery,
    kernel: Option<&Path>,
    initrd: Option<&Path>,
) -> anyhow::Result<Job> {
    let client = &session.client;
    for path in [Some(file), kernel, initrd].into_iter().flatten() {
        let data = std::fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
        if !data.is_file() {
            bail!("{} is not a regular file", path.display());
        }
    }
    if matches!(client.endpoint(), Endpoint::Unix(_)) {
        let by_path = ImportByPath {
            name: query.name.clone(),
            path: absolute(file)?,
            format: query.format,
            kernel: kernel.map(absolute).transpose()?,
            initrd: initrd.map(absolute).transpose()?,
            cmdline: query.cmdline.clone(),
            new_revision: query.new_revision,
        };
        match client.import_image_by_path(&by_path).await {
            Ok(job) => {
                let job = follow_job(session, &job).await?;
                let code = job.problem.as_ref().and_then(|problem| ErrorCode::from_text(&problem.code));
                if !code.is_some_and(unreadable) {
                    return Ok(job);
                }
            }
            Err(e) if unreadable(e.code()) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if let Some(kernel) = kernel {
        query.kernel = Some(client.put_blob(Upload::file(kernel).await?).await?.digest);
    }
    if let Some(initrd) = initrd {
        query.initrd = Some(client.put_blob(Upload::file(initrd).await?).await?.digest);
    }
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    let upload = Upload::file_with_progress(file, move |bytes| counter.store(bytes, Ordering::Relaxed)).await?;
    let total = upload.len().unwrap_or(0);
    let mut line = StatusLine::new();
    let request = client.import_image(&query, upload);
    tokio::pin!(request);
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(200));
    let job = loop {
        tokio::select! {
            job = &mut request => break job?,
            _ = tick.tick() => line.show(&format!("send {}: {}", file.display(), bar(sent.load(Ordering::Relaxed), total))),
        }
    };
    line.clear();
    follow_job(session, &job).await
}

/// The controller is in another mount namespace or runs as another user: then the bytes are sent.
fn unreadable(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::NotFound | ErrorCode::PermissionDenied | ErrorCode::Io)
}

async fn follow_job(session: &Session, job: &Job) -> anyhow::Result<Job> {
    let mut line = StatusLine::new();
    Ok(session.client.follow_job(&job.id, |job| line.show(&job_line(job))).await?)
}

fn finish<T: serde::de::DeserializeOwned>(job: Job) -> anyhow::Result<T> {
    match (job.state, job.problem, job.result) {
        (JobState::Done, _, Some(result)) => serde_json::from_value(result).context("read what came of the job"),
        (_, Some(problem), _) => Err(muster_api::ClientError::Problem(Box::new(problem)).into()),
        _ => bail!("{} {}: ended without a result", job.kind, job.subject),
    }
}

fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("find {}", path.display()))?;
    path.to_str().map(str::to_string).with_context(|| format!("{} is not UTF-8", path.display()))
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Auto => Format::Auto,
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        }
    }
}

fn list(images: &[Image]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "DIGEST",
        ">LOGICAL",
        ">UNIQUE 4K",
        "BOOT",
        ">VMS",
        ">VOLUMES",
        "RESIDENT ON",
        "TEMPLATES",
    ]);
    for i in images {
        table.row([
            format!("{}@{}", i.name, i.revision),
            i.digest.short(),
            ByteLen(i.logical_bytes).to_string(),
            ByteLen(i.resident_estimate_bytes).to_string(),
            boot(&i.boot).into(),
            i.vms.to_string(),
            i.volumes.to_string(),
            i.resident_on.join(" "),
            i.templates.join(" "),
        ]);
    }
    table.render()
}

fn boot(files: &BootFiles) -> &'static str {
    if files.kernel.is_some() { "direct" } else { "disk" }
}

fn show(i: &Image) -> String {
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("name", format!("{}@{}", i.name, i.revision));
    row("digest", i.digest.to_string());
    row("logical size", ByteLen(i.logical_bytes).to_string());
    row("unique 4 KiB blocks", ByteLen(i.resident_estimate_bytes).to_string());
    row("boot", boot(&i.boot).into());
    row("kernel command line", i.boot.cmdline.clone());
    row("from", if i.origin.is_empty() { format!("a {} file", format_word(i.format)) } else { i.origin.clone() });
    if let Some(parent) = &i.parent {
        row("parent", if i.parent_name.is_empty() { parent.to_string() } else { i.parent_name.clone() });
    }
    row("templates", i.templates.join(" "));
    row("VMs made from it", i.vms.to_string());
    let resident: Vec<String> = i
        .residency
        .iter()
        .map(|there| {
            format!("{} ({} volume{})", there.host_name, there.volumes, if there.volumes == 1 { "" } else { "s" })
        })
        .collect();
    row("resident on", resident.join(", "));
    table.render()
}

fn format_word(format: Format) -> &'static str {
    match format {
        Format::Auto => "raw or qcow2",
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

pub async fn template(session: &Session, verb: TemplateVerb) -> anyhow::Result<Ended> {
    let client = &session.client;
    match verb {
        TemplateVerb::Ls => {
            let templates = client.all_templates().await?;
            print(session.output, &templates, |templates| templates_table(templates))?;
        }
        TemplateVerb::Show { template } => {
            let template = client.template(&template).await?;
            print(session.output, &template, show_template)?;
        }
        TemplateVerb::Change { template, image, applications, no_applications, limits } => {
            let change = ChangeTemplate {
                image,
                applications: (no_applications || !applications.is_empty()).then_some(applications),
                system_limits: change_limits(limits.system_quota, limits.system_reserve, limits.system_when_full),
                data_limits: change_limits(limits.data_quota, limits.data_reserve, limits.data_when_full),
                tenant: limits.tenant,
            };
            let limited = change.system_limits.is_some() || change.data_limits.is_some();
            let template = client.change_template(&template, &change, None).await?;
            print(session.output, &template, show_template)?;
            eprintln!("muster: {}", who_gets_it(&template, limited));
        }
        TemplateVerb::Create { name, image, vcpus, memory, data, applications, limits } => {
            let create = CreateTemplate {
                name,
                image,
                vcpus,
                memory,
                data_volume: data,
                applications,
                boot: None,
                network: NetworkMode::None,
                system_limits: disk_limits(limits.system_quota, limits.system_reserve, limits.system_when_full),
                data_limits: disk_limits(limits.data_quota, limits.data_reserve, limits.data_when_full),
                tenant: limits.tenant,
            };
            let template = client.create_template(&create).await?;
            print(session.output, &template, |t| templates_table(std::slice::from_ref(t)))?;
        }
        TemplateVerb::Delete { template } => {
            client.delete_template(&template, None).await?;
            print_deleted(session.output, &template)?;
        }
    }
    Ok(Ended::AllDone)
}

fn disk_limits(quota: Option<ByteLen>, reservation: Option<ByteLen>, when_full: args::WhenFull) -> DiskLimits {
    DiskLimits { quota, reservation, when_full: when_full.into() }
}

/// None when nothing is to change.
fn change_limits(
    quota: Option<ByteLen>,
    reservation: Option<ByteLen>,
    when_full: Option<args::WhenFull>,
) -> Option<ChangeLimits> {
    let change = ChangeLimits { quota, reservation, when_full: when_full.map(Into::into) };
    (change != ChangeLimits::default()).then_some(change)
}

impl From<args::WhenFull> for WhenFull {
    fn from(when_full: args::WhenFull) -> WhenFull {
        match when_full {
            args::WhenFull::Pause => WhenFull::Pause,
            args::WhenFull::Spill => WhenFull::Spill,
        }
    }
}

/// Whom a change of a template reaches, and whom it does not.
fn who_gets_it(template: &Template, limited: bool) -> String {
    let mut text = format!("VMs made from {} from now on get this", template.name);
    match template.vms {
        0 => {}
        1 => text.push_str("; the VM made from it before stays as it is"),
        vms => text.push_str(&format!("; the {vms} VMs made from it before stay as they are")),
    }
    if limited && template.vms > 0 {
        text.push_str(" (`muster vm resize --quota` changes a quota of theirs, a new VM has new limits altogether)");
    }
    text
}

fn show_template(t: &Template) -> String {
    let limits = |limits: &DiskLimits| if limits.is_none() { "none".to_string() } else { limits.to_string() };
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("name", t.name.clone());
    row("image", format!("{} ({})", t.image_name, t.image.short()));
    row("processors", t.vcpus.to_string());
    row("memory", t.memory.to_string());
    row("system disk limits", limits(&t.system_limits));
    row("data volume", t.data_volume.map_or("none".into(), |d| d.to_string()));
    if t.data_volume.is_some() {
        row("data disk limits", limits(&t.data_limits));
    }
    row("tenant", t.tenant.clone().unwrap_or_else(|| "none".into()));
    row("applications", t.applications.iter().map(|a| a.image_name.as_str()).collect::<Vec<_>>().join(" "));
    row("boot", boot(&t.boot).into());
    row(
        "network",
        match &t.network {
            NetworkMode::None => "none".into(),
            NetworkMode::Bridge { name } => format!("bridge {name}"),
        },
    );
    row("VMs made from it", t.vms.to_string());
    table.render()
}

fn templates_table(templates: &[Template]) -> String {
    let mut table = Table::new(&["NAME", "IMAGE", ">VCPUS", ">MEMORY", ">DATA VOLUME", "APPLICATIONS", "BOOT", ">VMS"]);
    for t in templates {
        table.row([
            t.name.clone(),
            t.image_name.clone(),
            t.vcpus.to_string(),
            t.memory.to_string(),
            t.data_volume.map_or("-".into(), |d| d.to_string()),
            t.applications.iter().map(|a| a.image_name.as_str()).collect::<Vec<_>>().join(" "),
            boot(&t.boot).into(),
            t.vms.to_string(),
        ]);
    }
    table.render()
}
