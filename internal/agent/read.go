package agent

import "errors"

// ErrNothing says that there is neither an agent nor a data plane.
var ErrNothing = errors.New("no agent and no data plane on this node")

// ReadStatus returns the status of the running agent, or, with the agent down,
// what the pinned objects and policy.json tell; then Agent.State is Down.
func ReadStatus(bpfRoot, runDir string) (Status, error) {
	panic("not yet")
}
