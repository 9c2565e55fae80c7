from orchestrator.cli.start import main

main()
