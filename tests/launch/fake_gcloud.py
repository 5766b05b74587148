"""A fake gcloud: one TPU and its request, as a state machine in world.json in the same folder.

Tests write `faults` into world.json. A fault applies to calls whose arguments, joined by spaces,
contain all of its `words`, after `skip` such calls and to `times` of them. It may replace the
output by `code`, `out` and `err` (with `late`, after the call has had its effect), change the
`world`, and `sleep` before the output. All workers are one folder, home, in which bash runs the
commands of `ssh`, with the programs of worker/.
"""

import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
HOME = os.path.join(HERE, 'home')
NEXT_NODE = {
  'CREATING': 'READY',
  'STARTING': 'READY',
  'RESTARTING': 'READY',
  'REIMAGING': 'READY',
  'REPAIRING': 'READY',
  'STOPPING': 'STOPPED',
  'DELETING': None,
}
NEXT_QUEUE = {
  'WAITING_FOR_RESOURCES': ('PROVISIONING', 'CREATING'),
  'PROVISIONING': ('ACTIVE', 'READY'),
  'SUSPENDING': ('SUSPENDED', None),
}
NOT_FOUND = (1, '', 'ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found')


def new_home():
  import shutil  # imported here because this program starts a thousand times

  shutil.rmtree(HOME, ignore_errors=True)


def queued(verb, world):
  if verb == 'create':
    if world['queue']:
      return 1, '', 'ERROR: (gcloud) ALREADY_EXISTS: Resource already exists'
    world['queue'] = 'WAITING_FOR_RESOURCES'
    return 0, '', 'Create request issued for: [mine]'
  if not world['queue']:
    return NOT_FOUND
  if verb == 'delete':
    world['queue'] = world['node'] = None
    new_home()
    return 0, '', 'Deleted [mine].'
  answer = json.dumps(
    {'name': 'mine', 'state': {'state': world['queue'], 'stateInitiator': 'SERVICE'}}
  )
  if world['queue'] in NEXT_QUEUE and world['queue'] not in world['stuck']:
    world['queue'], world['node'] = NEXT_QUEUE[world['queue']]
  return 0, answer, ''


def node(verb, world, arguments):
  if not world['node']:
    return NOT_FOUND
  if verb == 'delete':
    world['node'] = None
    new_home()
  elif verb == 'start':
    world['node'] = 'STARTING'
  elif verb == 'describe':
    answer = json.dumps({'state': world['node'], 'acceleratorType': 'v5litepod-16'})
    if world['node'] not in world['stuck']:
      world['node'] = NEXT_NODE.get(world['node'], world['node'])
    return 0, answer, ''
  else:
    return workers(verb, world, arguments)
  return 0, '', ''


def workers(verb, world, arguments):
  if world['node'] != 'READY':
    return 255, '', 'ssh: connect to host: Connection timed out'
  os.makedirs(HOME, exist_ok=True)
  if verb == 'scp':
    if os.path.exists(arguments[3]):
      with open(arguments[3], 'rb') as source, open(f'{HOME}/rlhf_jax.tar.gz', 'wb') as target:
        target.write(source.read())
    return 0, '', ''
  [text] = [word.removeprefix('--command=') for word in arguments if word.startswith('--command=')]
  text = text.replace('/dev/shm/', f'{HOME}/').replace('/mnt/shared', f'{HOME}/shared')
  env = os.environ | {'HOME': HOME, 'PATH': f'{HERE}/worker:{os.environ["PATH"]}'}
  os.chdir(HOME)
  return (
    os.waitstatus_to_exitcode(os.waitpid(os.posix_spawnp('bash', ['bash', '-c', text], env), 0)[1]),
    '',
    '',
  )


def find_fault(world, text):
  """Returns the first fault that applies, and decreases its counts."""
  for fault in world['faults']:
    if all(word in text for word in fault['words']) and fault.get('times', 1):
      if fault.get('skip'):
        fault['skip'] -= 1
        continue
      fault['times'] = fault.get('times', 1) - 1
      return fault
  return {}


def main():
  arguments = sys.argv[1:]
  with open(f'{HERE}/calls.jsonl', 'a') as calls:
    calls.write(json.dumps(arguments) + '\n')
  with open(f'{HERE}/world.json') as file:
    world = json.load(file)
  fault = find_fault(world, ' '.join(arguments))
  answer = 0, '', ''
  if 'code' not in fault or fault.get('late'):
    _, _, kind, verb, *_ = arguments
    answer = queued(verb, world) if kind == 'queued-resources' else node(verb, world, arguments[1:])
  if 'code' in fault:
    answer = fault['code'], '', ''
  world.update(fault.get('world', {}))
  with open(f'{HERE}/world.json', 'w') as file:
    json.dump(world, file)
  time.sleep(fault.get('sleep', 0))
  sys.stdout.write(fault.get('out', answer[1]))
  sys.stderr.write(fault.get('err', answer[2]))
  return answer[0]


if __name__ == '__main__':
  sys.exit(main())
