package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// ErrNothing says that there is neither an agent nor a data plane.
var ErrNothing = errors.New("no agent and no data plane on this node")

// ReadStatus returns the status of the running agent, or, with the agent down,
// what the kernel holds and policy.json tell; then Agent.State is Down. Empty
// arguments mean the default places.
func ReadStatus(bpfRoot, runDir string) (Status, error) {
	runDir = orDefault(runDir, DefaultRunDir)
	return readStatus(runDir, answerTimeout, func(ctx context.Context) (inspector, error) {
		return inspectNode(ctx, orDefault(bpfRoot, DefaultBPFRoot), runDir)
	})
}

// readStatus gives the agent its time, and then the kernel its own: an agent that hangs takes
// all of it.
func readStatus(runDir string, timeout time.Duration, inspect func(context.Context) (inspector, error)) (Status, error) {
	s, err := ask(runDir, timeout)
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, fs.ErrPermission):
		return Status{}, advice.New(err, "run it as root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s, offErr := offline(runDir, func() (inspector, error) { return inspect(ctx) })
	switch {
	case errors.Is(err, errNoAgent):
	case offErr == nil:
		s.Warnings = append(s.Warnings, err.Error()) // it is there, but hangs or is of another version
	case errors.Is(offErr, ErrNothing):
		return Status{}, err // nothing can be read, but it is there
	}
	return s, offErr
}

// offline is the status without an agent.
func offline(runDir string, inspect func() (inspector, error)) (Status, error) {
	k, err := inspect()
	switch {
	case isNone(err):
		return Status{}, ErrNothing
	case err != nil:
		return Status{}, err
	}
	defer k.Close()
	f, err := ReadPolicyFile(runDir)
	if err != nil {
		return unexplained(k, err)
	}
	v := view{file: f, agent: AgentStatus{State: Down, PID: f.PID, Version: f.Version, Started: f.Started}}
	return v.status(time.Now(), k)
}

// unexplained is the status of a data plane without policy.json: what the kernel
// holds, without options and origins.
func unexplained(k inspector, why error) (Status, error) {
	exclusions, err := k.Exclusions()
	if err != nil {
		return Status{}, fmt.Errorf("read exclusions: %w", err)
	}
	v := view{
		file:     PolicyFile{Mode: modeOf(isFlowMeter(k)), IPMasqAgent: IPMasqStatus{Enabled: len(exclusions) > 0}},
		agent:    AgentStatus{State: Down},
		warnings: []string{fmt.Sprintf("what the data plane was told is not known: %v", why)},
	}
	s, err := v.status(time.Now(), k)
	s.IPMasqAgent.Prefixes = len(exclusions)
	for i := range s.Devices {
		s.Devices[i].State = DeviceAttached // no policy is known that it could have left
	}
	return s, err
}
