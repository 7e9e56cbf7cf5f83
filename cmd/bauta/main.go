// Command bauta masquerades the traffic that pods, containers and virtual
// machines send out of a Linux node.
package main

import (
	"os"

	"bauta.dev/bauta/internal/cli"
)

// version is set by builds outside of a git checkout: -ldflags "-X main.version=v1.2.3".
var version string

func main() {
	env := cli.System()
	env.Version = version
	os.Exit(cli.Main(env, os.Args[1:]))
}
