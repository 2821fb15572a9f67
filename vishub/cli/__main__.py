from vishub.cli import main

if __name__ == '__main__':  # not in the processes that a loader spawns
    main()
