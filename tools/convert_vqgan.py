"""The command convert_vqgan: see mom_tools.data.convert_vqgan."""

from mom_tools.data.convert_vqgan import main

if __name__ == "__main__":
    main()
