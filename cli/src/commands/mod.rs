//! The commands, one file each.

mod bench;
mod collect;
mod demo;
mod eval;
mod generate;
mod label;
mod predict;
mod pretrain;
pub mod profile;
mod report;
mod serve;
mod simulate;
mod train;

use clap::Subcommand;

use crate::args::Cli;

/// What is to be done.
#[derive(Subcommand)]
pub enum Command {
    /// The whole loop on the bundled model: collect, label, train, evaluate, serve, schedule
    Demo(demo::DemoArgs),
    /// Sample a model's responses to instructions and keep their lengths
    Collect(collect::CollectArgs),
    /// Turn sampled lengths into (instruction, length) pairs
    Label(label::LabelArgs),
    /// LoRA-tune a model to predict the length of its own responses
    Train(train::TrainArgs),
    /// Measure how good predictions are
    Eval(eval::EvalArgs),
    /// Predict the length of the response to each text
    Predict(predict::PredictArgs),
    /// Serve predictions over gRPC
    Serve(serve::ServeArgs),
    /// Answer every request of a file
    Generate(generate::GenerateArgs),
    /// Time strategies on the same requests
    Bench(bench::BenchArgs),
    /// Count what strategies would cost on known lengths, without a model
    Simulate(simulate::SimulateArgs),
    /// Draw the figures of results as SVG and one HTML page
    Report(report::Args),
    /// Measure prefill and step time by batch size and context
    Profile(profile::ProfileArgs),
    /// Make the bundled tiny model from a seed
    Pretrain(pretrain::PretrainArgs),
}

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Demo(args) => demo::run(global, &args),
        Command::Collect(args) => collect::run(global, &args),
        Command::Label(args) => label::run(global, &args),
        Command::Train(args) => train::run(global, &args),
        Command::Eval(args) => eval::run(global, &args),
        Command::Predict(args) => predict::run(global, &args),
        Command::Serve(args) => serve::run(global, &args),
        Command::Generate(args) => generate::run(global, &args),
        Command::Bench(args) => bench::run(global, &args),
        Command::Simulate(args) => simulate::run(global, &args),
        Command::Report(args) => report::run(global, &args),
        Command::Profile(args) => profile::run(global, &args),
        Command::Pretrain(args) => pretrain::run(global, &args),
    }
}
