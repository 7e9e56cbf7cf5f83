// Command bauta masquerades the traffic that pods, containers and virtual
// machines send out of a Linux node.
package main

import (
	"os"

	"bauta.dev/bauta/internal/cli"
)

func main() { os.Exit(cli.Main(cli.System(), os.Args[1:])) }
